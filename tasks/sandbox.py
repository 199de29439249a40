"""Runs the Python code that a model wrote, in a process that may compute and little else.

The process has an empty environment, no privileges, and a scratch folder. The kernel refuses it to open or list anything outside that
folder but Python's own files (Landlock); and new processes, other programs, sockets, signals, shared memory, changes of
modes, owners and limits (a seccomp filter). Memory, processor time and the size of a file are limited (setrlimit); its caller
stops it after SECONDS, or when it has printed OUTPUT bytes. Linux 6.2 or newer on x86_64 or aarch64; elsewhere it is
refused. Not covered: faults of the kernel, side channels, names and sizes of files outside, how many files it writes in its
folder within its seconds.

Earlier code of the same solution runs again first, with its output thrown away: no state is kept, and none can leak.
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

SECONDS, CPU_SECONDS, MEMORY, OUTPUT, FILE = 5, 4, 2**31, 2**16, 2**24
READY = b"\0"  # the first byte that a confined process writes
REFUSED = {  # system calls, with their numbers on x86_64 and aarch64 (which lacks some)
    "clone": (56, 220), "fork": (57,), "vfork": (58,), "clone3": (435, 435), "execve": (59, 221), "execveat": (322, 281),
    "setsid": (112, 157), "setpgid": (109, 154), "unshare": (272, 97), "setns": (308, 268),
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425), "bpf": (321, 280), "perf_event_open": (298, 241),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "setrlimit": (160, 164), "prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "truncate": (76, 45), "chmod": (90,), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92,),
    "fchown": (93, 55), "lchown": (94,), "fchownat": (260, 54), "utime": (132,), "utimes": (235,), "futimesat": (261,),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "shmat": (30, 196), "shmctl": (31, 195), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "semop": (65, 193),
    "semctl": (66, 191), "semtimedop": (220, 192), "mq_open": (240, 180), "mq_unlink": (241, 181), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "fallocate": (285, 47), "prctl": (157, 167), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}
NEWEST = 452  # later calls than this list knows are refused too
ARGUMENTS = (  # calls, and which values of their second argument are refused
    ((72, 25), "equal", (8, 10, 15, 1024, 1026)),  # fcntl: signals sent for a descriptor, leases and notes on files
    ((16, 29), "above", (0x10000,)),  # ioctl: all but those of terminals and descriptors, such as a file's flags
)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, and the kernel's number of the architecture


# --------------------------------------------------------------------------------------------- the process itself

def confine(scratch: str):
    """Give up all that the code must not have; OSError where the kernel cannot."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function, *arguments) -> int:
        result = function(*(ctypes.c_long(value) if isinstance(value, int) else value for value in arguments))
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result
    for limit, value in ((resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, FILE),
                         (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64)):
        resource.setrlimit(limit, (value, value))
    column, architecture = MACHINES[platform.machine()]
    call(libc.prctl, 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: it ends with its parent
    call(libc.prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call(libc.syscall, (126, 91)[column], struct.pack("Ii", 0x20080522, 0), bytes(24))  # capset: none
    version = call(libc.syscall, 444, None, 0, 1)  # landlock_create_ruleset; 3 knows truncation, 5 devices, 6 signals and sockets
    if version < 3:
        raise OSError(errno.ENOSYS, f"Landlock is of version {version}, 3 is needed")
    rights = (1 << (15 if version < 5 else 16)) - 1
    rules = call(libc.syscall, 444, struct.pack("QQQ", rights, 0, 3), 24 if version >= 6 else 8, 0)
    readable = {sys.prefix, sys.base_prefix, "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo"} - {"/"}
    for path, allowed in [(scratch, rights), ("/dev/null", 0b110), ("/dev/urandom", 0b100)] + [(path, 0b1101) for path in readable]:
        if os.path.exists(path):  # allowed: 1 execute (map as code), 2 write, 4 read files, 8 list folders
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call(libc.syscall, 445, rules, 1, struct.pack("=Qi", allowed if os.path.isdir(path) else allowed & 0b111, handle), 0)
            os.close(handle)
    call(libc.syscall, 446, rules, 0)  # landlock_restrict_self
    os.close(rules)
    numbers = [columns[column] for columns in REFUSED.values() if len(columns) > column]
    load, jump, refuse, allow = 0x20, {"equal": 0x15, "above": 0x35}, (0x06, 0, 0, 0x50000 | errno.EPERM), (0x06, 0, 0, 0x7FFF0000)

    def unless(kind, value):  # refuse such a value of what was loaded
        return [(jump[kind], 0, 1, value), refuse]
    program = [(load, 0, 0, 4), (jump["equal"], 1, 0, architecture), (0x06, 0, 0, 0x80000000), (load, 0, 0, 0), *unless("above", NEWEST + 1)]
    for number in numbers:  # another architecture's calls kill the process; x86_64's second numbers lie above the newest
        program += unless("equal", number)
    for columns, kind, values in ARGUMENTS:
        checks = [(load, 0, 0, 24), *(line for value in values for line in unless(kind, value)), allow]
        program += [(jump["equal"], 0, len(checks), columns[column]), *checks]
    program.append(allow)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    call(libc.prctl, 22, 2, struct.pack("HP", len(program), ctypes.addressof(code)), 0, 0)  # PR_SET_SECCOMP


def execute(block: str, names: dict):
    """Run a block as a notebook would: the value of a last expression is printed, an error is one line."""
    try:
        body = ast.parse(textwrap.dedent(block)).body
        last = ast.Expression(body.pop().value) if body and isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), "code", "exec"), names)
        value = eval(compile(last, "code", "eval"), names) if last else None
        if value is not None:
            print(value)
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: the next block runs all the same
        try:
            print(f"{type(error).__name__}: {error}".partition("\n")[0])
        except BaseException:  # what the error says may fail in turn, and so may printing
            print(type(error).__name__)


def main():
    blocks = json.load(sys.stdin)
    sys.path.pop(0)  # this file's own folder
    confine(os.getcwd())
    os.write(1, READY)
    null, shown = os.open("/dev/null", os.O_RDWR), os.dup(1)
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


# --------------------------------------------------------------------------------------------- its caller

def run(blocks: list[str]) -> tuple[str, str]:
    """What the last block prints, after the earlier ones have run; and the limit that stopped it: "", "time",
    "output" or "signal N". OSError where the process cannot be confined."""
    scratch = tempfile.mkdtemp()
    try:
        return run_in(scratch, blocks)
    finally:  # folders in folders without end, and without permissions, included
        subprocess.run(["sh", "-c", 'chmod -R u+rwx "$0"; rm -rf "$0"', scratch], stderr=subprocess.DEVNULL)


def run_in(scratch: str, blocks: list[str]) -> tuple[str, str]:
    environment = {"HOME": scratch, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
                   "PYTHONIOENCODING": "utf-8:backslashreplace"}
    with tempfile.TemporaryFile("w+") as program, tempfile.TemporaryFile() as errors:
        json.dump(blocks, program)
        program.seek(0)
        process = subprocess.Popen([sys.executable, "-s", "-B", os.path.abspath(__file__)], stdin=program, stdout=subprocess.PIPE,
                                   stderr=errors, cwd=scratch, env=environment, start_new_session=True)
        found, limit, until = b"", "", time.monotonic() + SECONDS
        while not limit:
            if not select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                limit = "time"
            elif chunk := os.read(process.stdout.fileno(), 4096):
                found += chunk
                limit = "output" if len(found) > OUTPUT else ""
            else:
                break
        try:
            process.wait(0 if limit else max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:  # also where it has closed its output and goes on
            limit = limit or "time"
            process.kill()  # it can have no children
        code = process.wait()
        process.stdout.close()
        errors.seek(0)
        if not found and not limit:
            reason = (errors.read(10**6).decode(errors="replace").strip().splitlines() or [f"status {code}"])[-1]
            raise OSError(f"model-written code cannot be confined here ({reason}); it takes Linux 6.2 or newer with Landlock and "
                          "seccomp, on x86_64 or aarch64")
    if not limit and code < 0:
        limit = "time" if -code in (signal.SIGXCPU, signal.SIGKILL) else f"signal {-code}"
    return found[1:OUTPUT].decode(errors="replace"), limit


if __name__ == "__main__":
    main()
