/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A target for AFL++ with half a gigabyte of heap that is initialised before
 * the fork server takes over.  The input is a program: `r` looks at a page,
 * `w` writes to one, `=` wants two to be the same.  In C because AFL++'s
 * compiler instruments that.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define SIZE (512UL << 20)
#define PAGE 4096
#define PAGES (SIZE / PAGE)
#define WORDS (PAGE / sizeof(uint64_t))

static uint64_t *heap;
/* Pages that this run has written to. */
static unsigned int mine[8], written;

static uint64_t initial(size_t page)
{
	return page * 0x9e3779b97f4a7c15UL + 1;
}

static uint64_t expected(size_t page)
{
	for (unsigned int i = 0; i < written; i++)
		if (mine[i] == page)
			return ~initial(page);
	return initial(page);
}

/* What an earlier run has done here must not be seen. */
static void look(size_t page)
{
	if (heap[page * WORDS] != expected(page))
		abort();
}

static int run(const unsigned char *input, size_t length)
{
	size_t at = 0, last = 0;

	while (at + 1 < length) {
		size_t page = input[at + 1] * 509 % PAGES;

		switch (input[at]) {
		case 'r':
			look(page);
			break;
		case 'w':
			if (written == sizeof(mine) / sizeof(*mine))
				return 1;
			look(page);
			if (expected(page) == initial(page)) {
				heap[page * WORDS] = ~initial(page);
				mine[written++] = page;
			}
			break;
		case '=':
			if (heap[page * WORDS] == heap[last * WORDS])
				return 2;
			break;
		default:
			return 3;
		}
		last = page;
		at += 2;
	}
	return 0;
}

int main(void)
{
	unsigned char input[64];
	ssize_t length;

	heap = malloc(SIZE);
	if (!heap)
		return 9;
	for (size_t page = 0; page < PAGES; page++)
		heap[page * WORDS] = initial(page);
	__AFL_INIT();
	length = read(0, input, sizeof(input));
	return length < 0 ? 9 : run(input, length);
}
