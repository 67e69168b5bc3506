/* The plainest page server: poll, read, pread, COPY. What vmd's demand path is measured against.
 *
 *   cloop SOCKET MEMORY     serve the first VMM that connects, one region, until it has gone
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static uint64_t field(const char *body, const char *name)
{
	const char *at = strstr(body, name);
	return at ? strtoull(at + strlen(name) + 2, 0, 10) : 0;
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	int memory = open(argv[2], O_RDONLY);
	int listener = socket(AF_UNIX, SOCK_STREAM, 0);
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	strncpy(name.sun_path, argv[1], sizeof name.sun_path - 1);
	if (memory < 0 || bind(listener, (void *)&name, sizeof name) || listen(listener, 1))
		return 1;
	puts("ready");
	fflush(stdout);
	int peer = accept(listener, 0, 0), uffd;
	char body[4096] = "", control[64];
	struct iovec part = { body, sizeof body - 1 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	if (recvmsg(peer, &message, 0) <= 0)
		return 1;
	memcpy(&uffd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof uffd);
	uint64_t base = field(body, "base_host_virt_addr"), offset = field(body, "offset");
	static char page[4096] __attribute__((aligned(4096)));
	struct pollfd ready[2] = { { uffd, POLLIN, 0 }, { peer, POLLIN, 0 } };
	for (;;) {
		poll(ready, 2, -1);
		if (ready[1].revents)
			return 0;
		struct uffd_msg fault;
		if (read(uffd, &fault, sizeof fault) != sizeof fault || fault.event != UFFD_EVENT_PAGEFAULT)
			continue;
		uint64_t address = fault.arg.pagefault.address & ~4095ull;
		if (pread(memory, page, sizeof page, (off_t)(address - base + offset)) != sizeof page)
			return 1;
		struct uffdio_copy copy = { .dst = address, .src = (uint64_t)page, .len = sizeof page };
		ioctl(uffd, UFFDIO_COPY, &copy);
	}
}
