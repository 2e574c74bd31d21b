// Addresses: one large range for the devices and one for page-locked host memory, given out in pages of 2 MiB.
//
// There is no memory behind the devices' range, and it may not even be read: code on the host that follows a pointer to
// device memory gets a SIGSEGV, as on a GPU. The page table is memory of the system that costs nothing until it is used.
#define _GNU_SOURCE
#include "runtime.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

struct page {
    size_t bytes;      // of the block that begins here
    uint32_t pages;    // of the block that begins here; 0: none does
    uint32_t first;    // number of the block's first page, plus 1; 0: the page is free
    int device;
};

struct arena {
    size_t size;
    char *start;
    struct page *table;
    size_t next;  // where to look for free pages: behind the last block, so that addresses come back late
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct arena arenas[] = {[ON_DEVICE] = {.size = (size_t)16 << 40}, [PINNED] = {.size = (size_t)1 << 40}};

static void *map(size_t size, int protection) {
    void *start = mmap(NULL, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) {
        perror("emulated CUDA: no addresses for its memory");
        abort();
    }
    return start;
}

static void make_arenas(void) {
    for (enum place place = ON_DEVICE; place <= PINNED; place++) {
        struct arena *arena = &arenas[place];
        bool readable = place == PINNED || settings()->real_memory;
        char *start = map(arena->size + PAGE_BYTES, readable ? PROT_READ | PROT_WRITE : PROT_NONE);
        arena->table = map(arena->size / PAGE_BYTES * sizeof(struct page), PROT_READ | PROT_WRITE);
        arena->start = (char *)(((uintptr_t)start + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1));
        // A core dump would otherwise have terabytes.
        madvise(start, arena->size + PAGE_BYTES, MADV_DONTDUMP);
    }
}

// Lazily, so that programs which never use a device (compilers, shells) inherit the library and pay nothing.
static struct arena *arena_of(enum place place) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_arenas);
    return &arenas[place];
}

static bool holds(const struct arena *arena, const void *address) {
    return (const char *)address >= arena->start && (const char *)address < arena->start + arena->size;
}

// Find `count` free pages in [from, to); return the first one's number, or `to`.
static size_t find_free(const struct arena *arena, size_t count, size_t from, size_t to) {
    size_t free = 0;
    for (size_t page = from; page < to; page++) {
        free = arena->table[page].first == 0 ? free + 1 : 0;
        if (free == count) return page + 1 - count;
    }
    return to;
}

void *take_addresses(enum place place, size_t bytes, int device) {
    struct arena *arena = arena_of(place);
    size_t all = arena->size / PAGE_BYTES;
    size_t count = (bytes + PAGE_BYTES - 1) / PAGE_BYTES;
    if (count == 0) count = 1;
    void *start = NULL;
    pthread_mutex_lock(&lock);
    size_t first = find_free(arena, count, arena->next, all);
    if (first == all) first = find_free(arena, count, 0, all);
    if (first < all) {
        for (size_t page = first; page < first + count; page++)
            arena->table[page] = (struct page){.first = (uint32_t)first + 1, .device = device};
        arena->table[first].bytes = bytes;
        arena->table[first].pages = (uint32_t)count;
        // One page between blocks: two of them never look like one.
        arena->next = first + count + 1 < all ? first + count + 1 : 0;
        start = arena->start + first * PAGE_BYTES;
    }
    pthread_mutex_unlock(&lock);
    return start;
}

static struct block block_of(const struct arena *arena, size_t page) {
    size_t first = arena->table[page].first - 1;
    return (struct block){
        .bytes = arena->table[first].bytes,
        .device = arena->table[page].device,
        .start = arena->start + first * PAGE_BYTES,
    };
}

bool give_back_addresses(enum place place, void *start, struct block *block) {
    struct arena *arena = arena_of(place);
    if (!holds(arena, start)) return false;
    size_t first = (size_t)((char *)start - arena->start) / PAGE_BYTES;
    pthread_mutex_lock(&lock);
    size_t count = arena->start + first * PAGE_BYTES == (char *)start ? arena->table[first].pages : 0;
    if (count > 0) {
        *block = block_of(arena, first);
        for (size_t page = first; page < first + count; page++) arena->table[page] = (struct page){0};
    }
    pthread_mutex_unlock(&lock);
    // The system takes the memory back, where there is any.
    if (count > 0 && (place == PINNED || settings()->real_memory)) madvise(start, count * PAGE_BYTES, MADV_DONTNEED);
    return count > 0;
}

bool find_block(enum place place, const void *address, struct block *block) {
    struct arena *arena = arena_of(place);
    if (!holds(arena, address)) return false;
    size_t page = (size_t)((const char *)address - arena->start) / PAGE_BYTES;
    pthread_mutex_lock(&lock);
    bool found = arena->table[page].first != 0;
    if (found) *block = block_of(arena, page);
    pthread_mutex_unlock(&lock);
    return found;
}

bool is_device_address(const void *address) { return holds(arena_of(ON_DEVICE), address); }
