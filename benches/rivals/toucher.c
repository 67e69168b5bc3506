/* A process that stands for a VMM: it owns memory, hands its userfaultfd to a page server, and
 * measures what a toucher sees.
 *
 *   toucher touch SOCKET BYTES TOUCHES SEED    touch pages one by one, in random order
 *   toucher bulk SOCKET BYTES                  wait until the page server has installed all of it
 *   toucher raw MEMORY BYTES                   no server: COPY all of it in 1 MiB pieces
 *
 * Prints one JSON object. Latencies in ns; server_cpu_ns is the page server's CPU time meanwhile.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ull
#define PIECE (1ull << 20)

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now(clockid_t clock)
{
	struct timespec time;
	clock_gettime(clock, &time);
	return (uint64_t)time.tv_sec * 1000000000ull + (uint64_t)time.tv_nsec;
}

static int register_memory(char *memory, uint64_t bytes)
{
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	int uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
	struct uffdio_register range = { { (uint64_t)memory, bytes }, UFFDIO_REGISTER_MODE_MISSING, 0 };
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &range))
		fail("userfaultfd");
	return uffd;
}

/* Connect, send the handshake; returns the CPU clock of the page server's process. */
static clockid_t shake_hands(const char *path, const char *memory, uint64_t bytes, int uffd)
{
	int peer = socket(AF_UNIX, SOCK_STREAM, 0);
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	strncpy(name.sun_path, path, sizeof name.sun_path - 1);
	if (connect(peer, (void *)&name, sizeof name))
		fail("connect");
	char body[256], control[CMSG_SPACE(sizeof uffd)] = { 0 };
	int size = snprintf(body, sizeof body, "[{\"base_host_virt_addr\":%lu,\"size\":%lu,\"offset\":0,\"page_size\":4096}]",
			    (unsigned long)memory, (unsigned long)bytes);
	struct iovec part = { body, (size_t)size };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
	rights->cmsg_level = SOL_SOCKET;
	rights->cmsg_type = SCM_RIGHTS;
	rights->cmsg_len = CMSG_LEN(sizeof uffd);
	memcpy(CMSG_DATA(rights), &uffd, sizeof uffd);
	if (sendmsg(peer, &message, 0) != size)
		fail("sendmsg");
	struct ucred server;
	socklen_t length = sizeof server;
	clockid_t clock;
	if (getsockopt(peer, SOL_SOCKET, SO_PEERCRED, &server, &length) || clock_getcpuclockid(server.pid, &clock))
		fail("server");
	return clock;
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return (x > y) - (x < y);
}

static void touch(char *memory, uint64_t bytes, uint64_t touches, uint64_t seed, clockid_t server)
{
	uint64_t pages = bytes / PAGE, *order = malloc(pages * 8), *ns = malloc(touches * 8), sum = 0;
	for (uint64_t i = 0; i < pages; i++)
		order[i] = i;
	for (uint64_t i = 0; i < touches; i++) {
		seed = seed * 6364136223846793005ull + 1442695040888963407ull;
		uint64_t j = i + (seed >> 33) % (pages - i), page = order[j];
		order[j] = order[i];
		order[i] = page;
	}
	for (uint64_t i = 0; i < 16; i++) /* the first faults start threads and fill caches */
		sum += (uint64_t)*(volatile char *)(memory + order[i] * PAGE);
	uint64_t cpu = now(server);
	for (uint64_t i = 16; i < touches; i++) {
		uint64_t start = now(CLOCK_MONOTONIC);
		sum += (uint64_t)*(volatile char *)(memory + order[i] * PAGE);
		ns[i] = now(CLOCK_MONOTONIC) - start;
	}
	cpu = now(server) - cpu;
	uint64_t count = touches - 16;
	qsort(ns + 16, count, 8, by_value);
	printf("{\"touches\":%lu,\"p50_ns\":%lu,\"p99_ns\":%lu,\"server_cpu_ns\":%lu,\"sum\":%lu}\n", count,
	       ns[16 + count / 2], ns[16 + count * 99 / 100], cpu / count, sum);
}

static int is_present(int pagemap, const char *address)
{
	uint64_t entry = 0;
	if (pread(pagemap, &entry, 8, (off_t)((uint64_t)address / PAGE * 8)) != 8)
		fail("pagemap");
	return (int)(entry >> 63);
}

static void wait_for_all(char *memory, uint64_t bytes)
{
	int pagemap = open("/proc/self/pagemap", O_RDONLY);
	struct timespec pause = { 0, 500000 }; /* often enough for 0.5 %, and no load of its own */
	uint64_t start = now(CLOCK_MONOTONIC);
	while (!is_present(pagemap, memory + bytes - PAGE))
		nanosleep(&pause, 0);
	uint64_t spent = now(CLOCK_MONOTONIC) - start, missing = 0;
	for (uint64_t at = 0; at < bytes; at += PAGE)
		missing += (uint64_t)!is_present(pagemap, memory + at);
	printf("{\"bytes\":%lu,\"ns\":%lu,\"missing\":%lu}\n", bytes, spent, missing);
}

static void copy_all(const char *path, char *memory, uint64_t bytes, int uffd)
{
	int file = open(path, O_RDONLY);
	char *source = mmap(0, bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
	if (source == MAP_FAILED)
		fail(path);
	uint64_t start = now(CLOCK_MONOTONIC);
	for (uint64_t at = 0; at < bytes; at += PIECE) {
		struct uffdio_copy copy = { .dst = (uint64_t)memory + at, .src = (uint64_t)source + at, .len = PIECE };
		if (ioctl(uffd, UFFDIO_COPY, &copy))
			fail("UFFDIO_COPY");
	}
	printf("{\"bytes\":%lu,\"ns\":%lu,\"missing\":0}\n", bytes, now(CLOCK_MONOTONIC) - start);
}

int main(int argc, char **argv)
{
	if (argc < 4)
		return 2;
	uint64_t bytes = strtoull(argv[3], 0, 10);
	char *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int uffd = register_memory(memory, bytes);
	if (!strcmp(argv[1], "raw")) {
		copy_all(argv[2], memory, bytes, uffd);
		return 0;
	}
	clockid_t server = shake_hands(argv[2], memory, bytes, uffd);
	if (!strcmp(argv[1], "touch") && argc == 6)
		touch(memory, bytes, strtoull(argv[4], 0, 10), strtoull(argv[5], 0, 10), server);
	else
		wait_for_all(memory, bytes);
	return 0;
}
