# SPDX-License-Identifier: MIT OR Apache-2.0
"""Forks workers over preloaded data; each reads its part, changes some of it, and tells what it saw."""

import json
import multiprocessing
import multiprocessing.popen_fork
import os
import time
import zlib

WORKERS = 8
RECORDS = 200_000
WORDS = 2_000_000


def record(n):
    return b"%d:" % n + bytes([n & 255]) * 1000


def words(part):
    return range(part, WORDS, WORKERS)


def digest(records, numbers, part):
    """What a worker's part of the data says. To read an object is to write its count of references."""
    crc = 0
    for n in range(part, RECORDS, WORKERS):
        crc = zlib.crc32(records[n], crc)
    return crc, sum(numbers[n] for n in words(part))


def worker(records, numbers, part, results):
    before = digest(records, numbers, part)
    # Changes that nobody else may see.
    for n in range(part, RECORDS, WORKERS * 100):
        records[n] = b"changed by %d" % part
    for n in range(part, WORDS, WORKERS * 100):
        numbers[n] = -n
    results.send((before, digest(records, numbers, part)))
    results.close()


def changed(part):
    crc = 0
    for n in range(part, RECORDS, WORKERS):
        mine = (n - part) % (WORKERS * 100) == 0
        crc = zlib.crc32(b"changed by %d" % part if mine else record(n), crc)
    total = sum(-n if (n - part) % (WORKERS * 100) == 0 else n * 3 for n in words(part))
    return crc, total


def main():
    records = [record(n) for n in range(RECORDS)]
    numbers = [n * 3 for n in range(WORDS)]
    expected = [digest(records, numbers, part) for part in range(WORKERS)]

    forks = []
    fork = os.fork

    def timed():
        # Time of this process: the workers before take the CPU in turns with it.
        start = time.process_time_ns()
        pid = fork()
        if pid:
            forks.append(time.process_time_ns() - start)
        return pid

    os.fork = timed
    context = multiprocessing.get_context("fork")
    start = time.perf_counter_ns()
    running = []
    for part in range(WORKERS):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=worker, args=(records, numbers, part, sender))
        process.start()
        sender.close()
        running.append((process, receiver))
        # The parent goes on writing, too: the next worker sees this, the earlier ones do not.
        records.append(b"started %d" % part)
    for part, (process, receiver) in enumerate(running):
        before, after = receiver.recv()
        process.join()
        assert process.exitcode == 0, process.exitcode
        assert before == expected[part], (part, "read", before, expected[part])
        assert after == changed(part), (part, "changed", after, changed(part))
    whole = time.perf_counter_ns() - start
    assert [digest(records, numbers, part) for part in range(WORKERS)] == expected, "the parent's data"
    assert len(forks) == WORKERS
    print(json.dumps({"fork": forks, "whole": [whole]}))


main()
