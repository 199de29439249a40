"""Runs the Python code that a model wrote, in a process that may compute and do little else.

The process has an empty environment, no privileges and a scratch folder. Three parts of the kernel
and the caller hold it:

- Landlock: it can open and list only its scratch folder and Python's own files.
- A seccomp filter refuses new processes, other programs, sockets, signals, shared memory, and
  changes of modes, owners and limits.
- setrlimit bounds its memory, its processor time and the size of a file.
- The caller stops it after SECONDS, or when it has printed OUTPUT bytes.

It needs Linux 6.2 or newer on x86_64 or aarch64, and refuses to run elsewhere. It does not cover
faults of the kernel, side channels, names and sizes of files outside, and how many files the code
writes to its folder within its seconds.

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

# System calls with their numbers on x86_64 and aarch64, which lacks some.
# fmt: off
REFUSED = {
    # processes, programs, sessions and namespaces
    "clone": (56, 220), "fork": (57,), "vfork": (58,), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281), "setsid": (112, 157), "setpgid": (109, 154),
    "unshare": (272, 97), "setns": (308, 268),
    # sockets and other ways into the kernel
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425),
    "bpf": (321, 280), "perf_event_open": (298, 241),
    # signals to other processes, and their memory
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    # limits and priorities
    "setrlimit": (160, 164), "prlimit64": (302, 261), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    # lengths, modes, owners, times and attributes of files
    "truncate": (76, 45), "chmod": (90,), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "chown": (92,), "fchown": (93, 55), "lchown": (94,),
    "fchownat": (260, 54), "utime": (132,), "utimes": (235,), "futimesat": (261,),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    # shared memory, messages, semaphores, and memory that is a file
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "shmat": (30, 196),
    "shmctl": (31, 195), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "mq_open": (240, 180),
    "mq_unlink": (241, 181), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # reserved disk, settings of the process, page faults, keys
    "fallocate": (285, 47), "prctl": (157, 167), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}
# fmt: on
NEWEST = 452  # later calls than this list knows are refused too

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
IF_AT_LEAST = 0x35
RETURN = 0x06
REFUSE = (RETURN, 0, 0, 0x50000 | errno.EPERM)  # SECCOMP_RET_ERRNO
ALLOW = (RETURN, 0, 0, 0x7FFF0000)  # SECCOMP_RET_ALLOW
KILL = (RETURN, 0, 0, 0x80000000)  # SECCOMP_RET_KILL_PROCESS
NUMBER = 0  # offsets in struct seccomp_data (linux/seccomp.h)
ARCHITECTURE = 4
SECOND_ARGUMENT = 24  # its low half

# Calls that are refused for some values of their second argument: numbers, test, values.
ARGUMENTS = (
    # fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE and F_NOTIFY, which send signals for a
    # descriptor, and take leases and notes on files
    ((72, 25), IF_EQUAL, (8, 10, 15, 1024, 1026)),
    # ioctl: all but those of terminals and descriptors, such as a file's flags
    ((16, 29), IF_AT_LEAST, (0x10000,)),
)

LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo")
LIBC = ctypes.CDLL(None, use_errno=True)


# ---------------------------------------------------------------------------- the process itself


def confine(scratch: str):
    """Give up all that the code must not have. OSError where the kernel cannot do it."""
    column, architecture = MACHINES[platform.machine()]
    set_limits()
    drop_privileges(column)
    restrict_files(scratch)
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


def restrict_files(scratch: str):
    """Allow the scratch folder, two devices and Python's own files, and no other (Landlock)."""
    version = call(LIBC.syscall, LANDLOCK_CREATE_RULESET, None, 0, 1)  # flag 1: say the version
    if version < 3:  # 3 knows truncation
        raise OSError(errno.ENOSYS, f"Landlock is of version {version}, 3 is needed")
    rights = (1 << (15 if version < 5 else 16)) - 1  # all bits of access; 5 adds devices
    ruleset = struct.pack("QQQ", rights, 0, 3)  # files; network; scopes: sockets and signals
    size = 24 if version >= 6 else 8  # bytes that the kernel reads; version 6 knows scopes
    rules = call(LIBC.syscall, LANDLOCK_CREATE_RULESET, ruleset, size, 0)
    allow_path(rules, scratch, rights)
    allow_path(rules, "/dev/null", READ_FILE | WRITE_FILE)
    allow_path(rules, "/dev/urandom", READ_FILE)
    # A prefix of "/" would allow every file.
    for path in {sys.prefix, sys.base_prefix, *LIBRARIES} - {"/"}:
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
    """The filter of system calls for a machine: kill, refuse or allow each call.

    A call of another architecture kills the process. x86_64 has a second set of numbers for its
    calls (x32). They lie above NEWEST, and are refused like all later calls.
    """
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (IF_EQUAL, 1, 0, architecture),
        KILL,
        (LOAD, 0, 0, NUMBER),
        *refuse_if(IF_AT_LEAST, NEWEST + 1),
    ]
    for numbers in REFUSED.values():
        if column < len(numbers):
            program += refuse_if(IF_EQUAL, numbers[column])
    for numbers, test, values in ARGUMENTS:
        checks = [(LOAD, 0, 0, SECOND_ARGUMENT)]
        for value in values:
            checks += refuse_if(test, value)
        checks.append(ALLOW)
        program += [(IF_EQUAL, 0, len(checks), numbers[column]), *checks]
    return [*program, ALLOW]


def refuse_if(test: int, value: int) -> list[Instruction]:
    """Instructions that refuse the call if the word that was loaded passes the test."""
    return [(test, 0, 1, value), REFUSE]


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
    confine(os.getcwd())
    os.write(1, READY)
    null = os.open("/dev/null", os.O_RDWR)
    shown = os.dup(1)
    os.dup2(null, 0)
    os.dup2(null, 1)
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
    scratch = tempfile.mkdtemp()
    try:
        return run_in(scratch, blocks)
    finally:  # the folder may hold endless nesting, and folders without permissions
        remove = 'chmod -R u+rwx "$0"; rm -rf "$0"'
        subprocess.run(["sh", "-c", remove, scratch], stderr=subprocess.DEVNULL)


def run_in(scratch: str, blocks: list[str]) -> tuple[str, str]:
    """Run blocks of code in a scratch folder. Returns and raises what `run` does."""
    with tempfile.TemporaryFile("w+") as program, tempfile.TemporaryFile() as errors:
        json.dump(blocks, program)
        program.seek(0)
        process = start(scratch, program, errors)
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


def start(scratch: str, program, errors) -> subprocess.Popen:
    """Start this file as a process that reads `program` and writes its errors to `errors`."""
    environment = {
        "HOME": scratch,
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
        cwd=scratch,
        env=environment,
        start_new_session=True,
    )


def read_output(process: subprocess.Popen, until: float) -> tuple[bytes, str]:
    """Read what a process prints until it closes its output or meets a limit.

    `until` is a time of time.monotonic. Returns the bytes, READY included, and the limit: "" for
    none, "time" or "output".
    """
    found = b""
    while len(found) <= OUTPUT:
        left = max(0.0, until - time.monotonic())  # seconds
        if not select.select([process.stdout], [], [], left)[0]:
            return found, "time"
        chunk = os.read(process.stdout.fileno(), 4096)
        if not chunk:
            return found, ""
        found += chunk
    return found, "output"


if __name__ == "__main__":
    main()
