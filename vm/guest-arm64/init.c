// SPDX-License-Identifier: LGPL-2.1-or-later
/*
 * The only program of the arm64 guests. It reads lines from the console and answers each with
 * "khoscope-init: WORD RESULT", where a negative result is an errno:
 *
 *	memfd SIZE	preserves a memfd of SIZE bytes in a session of the Live Update Orchestrator
 *	load WORDS	loads this very kernel for the kexec, with the command line WORDS
 *	kexec		jumps into it
 *
 * It says "khoscope-init: boot N" first, N out of khoscope_boot=N on its own command line. It
 * needs no C library, so that building it takes nothing but the cross compiler.
 */
#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/ioctl.h>
#include <linux/reboot.h>
#include <linux/types.h>

/* include/uapi/linux/liveupdate.h, which installed headers are too old for. */
#define LIVEUPDATE_IOCTL_CREATE_SESSION _IO(0xBA, 0x00)
#define LIVEUPDATE_SESSION_PRESERVE_FD	_IO(0xBA, 0x40)

struct liveupdate_ioctl_create_session {
	__u32 size;
	__s32 fd;
	__u8 name[64];
};

struct liveupdate_session_preserve_fd {
	__u32 size;
	__s32 fd;
	__aligned_u64 token;
};

static long kmsg;

static long call(long number, long a, long b, long c, long d, long e)
{
	register long x0 asm("x0") = a;
	register long x1 asm("x1") = b;
	register long x2 asm("x2") = c;
	register long x3 asm("x3") = d;
	register long x4 asm("x4") = e;
	register long x8 asm("x8") = number;

	asm volatile("svc #0"
		     : "+r"(x0)
		     : "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x8)
		     : "memory");
	return x0;
}

static unsigned long length(const char *text)
{
	unsigned long n = 0;

	while (text[n])
		n++;
	return n;
}

static char *copy(char *to, const char *text)
{
	while (*text)
		*to++ = *text++;
	return to;
}

/* By way of the kernel's log: its lines are whole, whatever else is on the console. */
static void answer(const char *word, long result)
{
	unsigned long rest = result < 0 ? -(unsigned long)result : (unsigned long)result;
	char digits[24], line[100], *end;
	char *at = digits + sizeof(digits) - 1;

	*at = 0;
	do {
		*--at = '0' + rest % 10;
		rest /= 10;
	} while (rest);
	end = copy(line, "khoscope-init: ");
	end = copy(end, word);
	end = copy(end, result < 0 ? " -" : " ");
	end = copy(end, at);
	/* Without it the kernel waits for the rest of the line. */
	end = copy(end, "\n");
	call(__NR_write, kmsg, (long)line, end - line, 0, 0);
}

static unsigned long number(const char *text)
{
	unsigned long n = 0;

	while (*text >= '0' && *text <= '9')
		n = 10 * n + *text++ - '0';
	return n;
}

/* What follows `start` if the text begins with that, else NULL. */
static const char *after(const char *text, const char *start)
{
	while (*start)
		if (*text++ != *start++)
			return 0;
	return text;
}

static long open_file(const char *path, long flags)
{
	return call(__NR_openat, AT_FDCWD, (long)path, flags, 0, 0);
}

static long load(const char *command_line)
{
	long kernel = open_file("/Image", O_RDONLY), initramfs = open_file("/next", O_RDONLY);

	if (kernel < 0)
		return kernel;
	if (initramfs < 0)
		return initramfs;
	/* The length counts the NUL. */
	return call(__NR_kexec_file_load, kernel, initramfs, length(command_line) + 1,
		    (long)command_line, 0);
}

/* What is preserved stays so while this process, which never ends, has the session open. */
static long preserve_memfd(unsigned long size)
{
	static char content[1 << 16];
	struct liveupdate_ioctl_create_session session = { sizeof(session), -1, "arm64" };
	struct liveupdate_session_preserve_fd file = { sizeof(file), -1, 1 };
	long luo, ret;

	luo = open_file("/dev/liveupdate", O_RDWR);
	if (luo < 0)
		return luo;
	ret = call(__NR_ioctl, luo, LIVEUPDATE_IOCTL_CREATE_SESSION, (long)&session, 0, 0);
	if (ret < 0)
		return ret;
	file.fd = call(__NR_memfd_create, (long)"arm64", 0, 0, 0, 0);
	if (file.fd < 0)
		return file.fd;
	for (unsigned long i = 0; i < sizeof(content); i++)
		content[i] = i;
	while (size) {
		unsigned long part = size < sizeof(content) ? size : sizeof(content);

		ret = call(__NR_write, file.fd, (long)content, part, 0, 0);
		if (ret < 0)
			return ret;
		size -= ret;
	}
	return call(__NR_ioctl, session.fd, LIVEUPDATE_SESSION_PRESERVE_FD, (long)&file, 0, 0);
}

static void obey(const char *line)
{
	const char *rest;

	if ((rest = after(line, "memfd ")))
		answer("memfd", preserve_memfd(number(rest)));
	else if ((rest = after(line, "load ")))
		answer("load", load(rest));
	else if (after(line, "kexec"))
		answer("kexec", call(__NR_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2,
				     LINUX_REBOOT_CMD_KEXEC, 0, 0));
	else
		answer("unknown", -1);
}

void run(long *stack);
void run(long *stack)
{
	/* Words of the command line that no part of the kernel knows become the environment. */
	const char **environment = (const char **)stack + 1 + stack[0] + 1;
	const char *boot = 0;
	char line[2048];

	call(__NR_mount, (long)"devtmpfs", (long)"/dev", (long)"devtmpfs", 0, 0);
	kmsg = open_file("/dev/kmsg", O_WRONLY);
	/* As any init does: the kernel makes its boot id when it is first asked for it. */
	call(__NR_mount, (long)"proc", (long)"/proc", (long)"proc", 0, 0);
	call(__NR_read, open_file("/proc/sys/kernel/random/boot_id", O_RDONLY), (long)line,
	     sizeof(line), 0, 0);
	while (*environment && !boot)
		boot = after(*environment++, "khoscope_boot=");
	answer("boot", boot ? (long)number(boot) : -1);
	for (;;) {
		long n = call(__NR_read, 0, (long)line, sizeof(line), 0, 0);

		if (n <= 0) {
			answer("read", n);
			continue;
		}
		line[n - 1] = 0; /* instead of the newline */
		obey(line);
	}
}

asm(".globl _start\n"
    "_start:\n"
    "	mov	x0, sp\n"
    "	b	run\n");
