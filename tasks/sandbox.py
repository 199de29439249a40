"""Runs the Python code that a model wrote, in a process that may compute and do little else.

The process has an empty environment and no privileges. Four parts of the kernel and the caller
hold it:

- A mount namespace gives it a folder in memory that no other process sees, and that ends with it.
  DISK bounds its bytes and files. Where no namespace can be made, the code cannot write files.
- Landlock: it can open and list only this folder and Python's libraries.
- A seccomp filter allows the system calls that computing takes, and no others.
- setrlimit bounds its memory, its processor time and the size of a file.
- The caller stops it after SECONDS, or when it has printed OUTPUT bytes.

It needs Linux 6.2 or newer on x86_64 or aarch64, and refuses to run elsewhere. It does not cover
faults of the kernel, side channels such as time, and names and sizes of files outside, which the
code can ask for but not change.

Earlier code of the same solution runs again first, and its output is thrown away. No state is
kept, so none can leak.
"""

import ast
import contextlib
import ctypes
import errno
import json
import os
import platform
import random
import resource
import select
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time

SECONDS = 5  # of the clock, for all blocks together
CPU_SECONDS = 4  # of the processor
MEMORY = 2**31  # bytes of address space
OUTPUT = 2**16  # bytes printed
FILE = 2**24  # bytes of one file
OPEN_FILES = 64  # descriptors open at the same time
READY = b"\0"  # the first byte that a confined process writes

# Column of the tables below, and the kernel's number of the architecture (linux/audit.h).
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# System calls that code may make, with their numbers on x86_64 and aarch64, which lacks some. What
# could tell processes of one another (flock, inotify, statfs, sysinfo) is not among them.
# fmt: off
ALLOWED = {
    # files
    "read": (0, 63), "write": (1, 64), "open": (2,), "close": (3, 57), "stat": (4,),
    "fstat": (5, 80), "lstat": (6,), "lseek": (8, 62), "pread64": (17, 67), "pwrite64": (18, 68),
    "readv": (19, 65), "writev": (20, 66), "access": (21,), "pipe": (22,), "dup": (32, 23),
    "dup2": (33,), "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "rename": (82,), "mkdir": (83,),
    "rmdir": (84,), "unlink": (87,), "symlink": (88,), "readlink": (89,), "umask": (95, 166),
    "getdents64": (217, 61), "fadvise64": (221, 223), "openat": (257, 56), "mkdirat": (258, 34),
    "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38), "symlinkat": (266, 36),
    "readlinkat": (267, 78), "faccessat": (269, 48), "dup3": (292, 24), "pipe2": (293, 59),
    "renameat2": (316, 276), "statx": (332, 291), "close_range": (436, 436),
    "faccessat2": (439, 439),
    # memory
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "mremap": (25, 216), "madvise": (28, 233),
    # time and waiting
    "poll": (7,), "select": (23,), "sched_yield": (24, 124), "nanosleep": (35, 101),
    "alarm": (37,), "setitimer": (38, 103), "gettimeofday": (96, 169), "time": (201,),
    "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "pselect6": (270, 72), "ppoll": (271, 73),
    # the process itself
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178),
    "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "uname": (63, 160), "getrlimit": (97, 163), "getrusage": (98, 165), "times": (100, 153),
    "sched_getaffinity": (204, 123), "getcpu": (309, 168), "getrandom": (318, 278),
    "rseq": (334, 293), "exit": (60, 93), "exit_group": (231, 94),
}
# fmt: on

# Capabilities and settings of a process (linux/capability.h, linux/prctl.h).
CAPSET = (126, 91)  # system call on x86_64 and aarch64
CAPABILITY_VERSION_3 = 0x20080522
PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2

# Landlock (linux/landlock.h): system calls, the same on both machines, and bits of access.
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446
EXECUTE = 1  # includes mapping a file as code
WRITE_FILE = 2
READ_FILE = 4
READ_DIR = 8
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE  # the other bits speak of folders

# Instructions of a seccomp filter (linux/filter.h): code, jumps if true and if false, value.
Instruction = tuple[int, int, int, int]
LOAD = 0x20  # a 32-bit word of the call, by its offset in bytes
IF_EQUAL = 0x15  # the two jumps count the instructions to skip
IF_ANY = 0x45  # any of these bits
RETURN = 0x06
REFUSE = (RETURN, 0, 0, 0x50000 | errno.EPERM)  # SECCOMP_RET_ERRNO
ALLOW = (RETURN, 0, 0, 0x7FFF0000)  # SECCOMP_RET_ALLOW
KILL = (RETURN, 0, 0, 0x80000000)  # SECCOMP_RET_KILL_PROCESS
NUMBER = 0  # offsets in struct seccomp_data (linux/seccomp.h)
ARCHITECTURE = 4
FIRST_ARGUMENT = 16  # each has 8 bytes, the low half first

# Calls that are allowed for some values of an argument: numbers, the argument's place, values.
ARGUMENTS = (
    # fcntl: duplicates and flags of descriptors; neither locks, leases, notes nor owners
    ((72, 25), 1, (0, 1, 2, 3, 4, 1030)),
    # ioctl: whether a descriptor is a terminal, and whether it is closed by a new program
    ((16, 29), 1, (0x5401, 0x5413, 0x5450, 0x5451)),
    # prlimit64: to read limits, not to set them
    ((302, 261), 2, (0,)),
)

# Calls that are allowed by a bit of an argument: numbers, the argument's place, the bit, and
# whether it must be set. Shared memory would not count towards the limit, and could wake others.
BITS = (
    ((9, 222), 3, 1, False),  # mmap: not MAP_SHARED
    ((202, 98), 1, 128, True),  # futex: FUTEX_PRIVATE_FLAG
)

# The folder in memory (linux/sched.h, linux/mount.h): a new mount table, and a new user who may
# change it.
CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
MS_PRIVATE = 1 << 18
MS_REC = 1 << 14
MS_BIND = 1 << 12
MS_REMOUNT = 1 << 5
MS_NOATIME = 1 << 10
MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
DISK = b"size=64m,nr_inodes=1000,mode=700"  # options of the folder in memory
PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/mnt", "/media")  # folders that it may lie over

LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo")
LIBC = ctypes.CDLL(None, use_errno=True)


# ---------------------------------------------------------------------------- the process itself


def confine():
    """Give up all that the code must not have. OSError where the kernel cannot do it."""
    column, architecture = MACHINES[platform.machine()]
    set_limits()
    folder = private_folder()
    os.chdir(folder or "/")
    os.environ |= {"HOME": os.getcwd(), "TMPDIR": os.getcwd()}
    drop_privileges(column)
    restrict_files(folder)
    filter_calls(filter_program(column, architecture))


def call(function, *arguments) -> int:
    """Call a function of the C library, whole numbers as longs. OSError where it fails."""
    longs = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = function(*longs)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def set_limits():
    """Set the limits of the process. The filter refuses to raise them again."""
    limits = {
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: FILE,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: OPEN_FILES,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def drop_privileges(column: int):
    """Give up all capabilities and ways to new ones, and end with the parent."""
    call(LIBC.prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    call(LIBC.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    this_process = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    no_capabilities = bytes(24)
    call(LIBC.syscall, CAPSET[column], this_process, no_capabilities)


def libraries() -> set[str]:
    """The folders of Python's modules and of shared libraries; nothing else of an environment's."""
    paths = sysconfig.get_paths()
    modules = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return {*modules, os.path.join(sys.base_prefix, "lib"), *LIBRARIES}


def private_folder() -> str:
    """A folder in memory that only this process sees; "" where none can be made."""
    needed = [os.path.realpath(path) + "/" for path in libraries()]
    for place in PLACES:
        if os.path.isdir(place) and not any(path.startswith(place + "/") for path in needed):
            break
    else:
        return ""
    user, group = os.getuid(), os.getgid()
    try:
        if LIBC.unshare(CLONE_NEWNS) != 0:  # whoever may not do so may as a user of its own
            call(LIBC.unshare, CLONE_NEWUSER | CLONE_NEWNS)
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        call(LIBC.mount, b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        call(LIBC.mount, b"tmpfs", place.encode(), b"tmpfs", MS_NOSUID_NODEV_NOEXEC, DISK)
        # the sizes of folders in /proc say what other processes do
        call(LIBC.mount, b"tmpfs", b"/proc", b"tmpfs", MS_NOSUID_NODEV_NOEXEC, b"mode=0")
    except OSError:
        return ""
    # reading a file would leave its time behind; where that cannot be changed, it stays
    LIBC.mount(None, b"/", None, MS_REMOUNT | MS_BIND | MS_NOATIME, None)
    return place


def restrict_files(folder: str):
    """Allow the folder, two devices and Python's libraries, and no other file (Landlock)."""
    version = call(LIBC.syscall, LANDLOCK_CREATE_RULESET, None, 0, 1)  # flag 1: say the version
    if version < 3:  # 3 knows truncation
        raise OSError(errno.ENOSYS, f"Landlock is of version {version}, 3 is needed")
    rights = (1 << (15 if version < 5 else 16)) - 1  # all bits of access; 5 adds devices
    ruleset = struct.pack("QQQ", rights, 0, 3)  # files; network; scopes: sockets and signals
    size = 24 if version >= 6 else 8  # bytes that the kernel reads; version 6 knows scopes
    rules = call(LIBC.syscall, LANDLOCK_CREATE_RULESET, ruleset, size, 0)
    if folder:
        allow_path(rules, folder, rights)
    allow_path(rules, "/dev/null", READ_FILE | WRITE_FILE)
    allow_path(rules, "/dev/urandom", READ_FILE)
    for path in libraries():
        allow_path(rules, path, EXECUTE | READ_FILE | READ_DIR)
    call(LIBC.syscall, LANDLOCK_RESTRICT_SELF, rules, 0)
    os.close(rules)


def allow_path(rules: int, path: str, allowed: int):
    """Add a rule for a file, or for a folder and all below it, where it exists."""
    if not os.path.exists(path):
        return
    if not os.path.isdir(path):
        allowed &= OF_A_FILE  # the kernel takes no other bit for a file
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", allowed, handle)
    call(LIBC.syscall, LANDLOCK_ADD_RULE, rules, 1, rule, 0)  # 1: a rule about a path
    os.close(handle)


def filter_program(column: int, architecture: int) -> list[Instruction]:
    """The filter of system calls for a machine: allow what is listed, and refuse the rest.

    A call of another architecture kills the process. The second set of numbers that x86_64 has for
    its calls (x32) is not in the list.
    """
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (IF_EQUAL, 1, 0, architecture),
        KILL,
        (LOAD, 0, 0, NUMBER),
    ]
    for numbers in ALLOWED.values():
        if column < len(numbers):
            program += [(IF_EQUAL, 0, 1, numbers[column]), ALLOW]
    for numbers, place, values in ARGUMENTS:
        low = FIRST_ARGUMENT + 8 * place
        checks = [(LOAD, 0, 0, low + 4), (IF_EQUAL, 1, 0, 0), REFUSE, (LOAD, 0, 0, low)]
        for value in values:
            checks += [(IF_EQUAL, 0, 1, value), ALLOW]
        checks.append(REFUSE)
        program += [(IF_EQUAL, 0, len(checks), numbers[column]), *checks]
    for numbers, place, bit, needed in BITS:
        checks = [(LOAD, 0, 0, FIRST_ARGUMENT + 8 * place), (IF_ANY, 0, 1, bit)]
        checks += [ALLOW, REFUSE] if needed else [REFUSE, ALLOW]
        program += [(IF_EQUAL, 0, len(checks), numbers[column]), *checks]
    return [*program, REFUSE]


def filter_calls(program: list[Instruction]):
    """Put a filter of system calls into force. It holds as long as the process lives."""
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    code = ctypes.create_string_buffer(packed)
    header = struct.pack("HP", len(program), ctypes.addressof(code))
    call(LIBC.prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)


def execute(block: str, names: dict):
    """Run a block as a notebook would.

    The value of a last expression is printed, an error becomes one line.
    """
    try:
        body = ast.parse(textwrap.dedent(block)).body
        last = ast.Expression(body.pop().value) if body and isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), "code", "exec"), names)
        value = eval(compile(last, "code", "eval"), names) if last else None
        if value is not None:
            print(value)
    except BaseException as error:  # the next block runs even after SystemExit
        try:
            print(f"{type(error).__name__}: {error}".partition("\n")[0])
        except BaseException:  # what the error says may fail in turn, and so may printing
            print(type(error).__name__)


def main():
    """Run the blocks that stand in stdin as JSON. Only the last one's output is shown."""
    blocks = json.load(sys.stdin)
    sys.path.pop(0)  # this file's own folder
    confine()
    os.write(1, READY)
    null = os.open("/dev/null", os.O_RDWR)
    shown = os.dup(1)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    random.seed(0)
    names = {"__name__": "__main__"}
    with contextlib.suppress(BaseException):
        for block in blocks[:-1]:
            execute(block, names)
        sys.stdout.flush()
    os.dup2(shown, 1)
    with contextlib.suppress(BaseException):
        execute(blocks[-1], names)
        sys.stdout.flush()
    os._exit(0)


# ------------------------------------------------------------------------------------ its caller


def run(blocks: list[str]) -> tuple[str, str]:
    """Run blocks of code, and return what the last one prints.

    The second value is the limit that stopped them: "" for none, "time", "output" or "signal N".
    OSError where the process cannot be confined.
    """
    with tempfile.TemporaryFile("w+") as program, tempfile.TemporaryFile() as errors:
        json.dump(blocks, program)
        program.seek(0)
        process = start(program, errors)
        until = time.monotonic() + SECONDS
        found, limit = read_output(process, until)
        try:
            process.wait(0 if limit else max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:  # also where it has closed its output and goes on
            limit = limit or "time"
            process.kill()  # it can have no children
        code = process.wait()
        process.stdout.close()
        if not found and not limit:  # not even READY
            errors.seek(0)
            lines = errors.read(10**6).decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"status {code}"
            raise OSError(
                f"model-written code cannot be confined here ({reason}); it takes Linux 6.2 or "
                "newer with Landlock and seccomp, on x86_64 or aarch64"
            )
    if not limit and code < 0:
        limit = "time" if -code in (signal.SIGXCPU, signal.SIGKILL) else f"signal {-code}"
    return found[len(READY) : OUTPUT].decode(errors="replace"), limit


def start(program, errors) -> subprocess.Popen:
    """Start this file as a process that reads `program` and writes its errors to `errors`."""
    environment = {
        "PYTHONHASHSEED": "0",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
    }
    return subprocess.Popen(
        [sys.executable, "-s", "-B", os.path.abspath(__file__)],
        stdin=program,
        stdout=subprocess.PIPE,
        stderr=errors,
        cwd="/",
        env=environment,
        start_new_session=True,
    )


def read_output(process: subprocess.Popen, until: float) -> tuple[bytes, str]:
    """Read what a process prints until it closes its output or meets a limit.

    `until` is a time of time.monotonic. Returns the bytes, READY included, and the limit: "" for
    none, "time" or "output".
    """
    found = b""
    ready = select.poll()  # select takes no descriptor above 1023
    ready.register(process.stdout, select.POLLIN)
    while len(found) <= OUTPUT:
        left = max(0.0, until - time.monotonic())  # seconds
        if not ready.poll(1000 * left):
            return found, "time"
        chunk = os.read(process.stdout.fileno(), 4096)
        if not chunk:
            return found, ""
        found += chunk
    return found, "output"


if __name__ == "__main__":
    main()
