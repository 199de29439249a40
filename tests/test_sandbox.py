"""Programs that a model might write, and what they must not reach. SVPO_LONG tries each call."""

import os
import platform
import random
import subprocess
import sys
import tempfile
import time

import conftest
import pytest
from conftest import ROOT

from tasks import sandbox
from tasks.sandbox import run

LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
REFUSED = "-1 1\n"  # what a call returns, and EPERM


def c(expression: str) -> str:
    """A program that prints what a call of the C library returns, and its error."""
    return f"{LIBC}print(libc.{expression}, ctypes.get_errno())"


def opened(path: str) -> str:
    return f"print(open({path!r}, 'rb').read(100))"


DENIED = "PermissionError"
PROCESSES = {
    "fork bomb": ("import os\nwhile True: os.fork()", DENIED),
    "another program": ("import subprocess\nsubprocess.run(['ls', '/'])", DENIED),
    "a shell": ("import os\nprint(os.system('ls /'))", "\n"),
    "a shell in Python": ("import subprocess\nsubprocess.run('ls /', shell=True)", DENIED),
    "popen": ("import os\nos.popen('ls /').read()", DENIED),
    "spawn": ("import os\nos.posix_spawn('/bin/ls', ['ls'], {})", DENIED),
    "a program in its place": ("import os\nos.execv('/bin/ls', ['ls', '/'])", DENIED),
    "a program by descriptor": (
        "import os\nos.execve(os.open('/usr/lib', 0), ['x'], {})",
        DENIED,
    ),
    "a child left behind": (
        "import os\nif os.fork() == 0:\n    import time\n    time.sleep(1000)",
        DENIED,
    ),
    "a terminal's child": ("import pty\npty.fork()", "rror"),
    "multiprocessing": (
        "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
        "rror",
    ),
    "threads": ("import threading\nthreading.Thread(target=print).start()", "RuntimeError"),
    "many threads": ("import _thread\n_thread.start_new_thread(print, ())", "RuntimeError"),
    "a pool": (
        "from concurrent.futures import ThreadPoolExecutor as T\nT().submit(print)",
        "rror",
    ),
    "clone": (c("syscall(56 if ctypes.sizeof(ctypes.c_long) else 220, 0, 0, 0, 0, 0)"), "-1 "),
    "clone3": (c("syscall(435, 0, 0)"), REFUSED),
    "a session": ("import os\nos.setsid()", DENIED),
    "a group": ("import os\nos.setpgid(0, 0)", DENIED),
    "namespaces": (c("unshare(0x10000000)"), REFUSED),
    "another's namespace": (c("setns(0, 0)"), REFUSED),
    "a module of the kernel": (c("syscall(175, 0, 0, 0)"), REFUSED),
    "tracing": (c("ptrace(0, 0, 0, 0)"), REFUSED),
    "tracing the parent": (c("ptrace(16, libc.getppid(), 0, 0)"), REFUSED),
    "memory of the parent": (c("process_vm_readv(libc.getppid(), 0, 0, 0, 0, 0)"), REFUSED),
    "longer than its parent": (c("prctl(1, 0)"), REFUSED),
    "privileges": (c("prctl(24, 21, 0, 0, 0)"), REFUSED),
    "another user": ("import os\nos.setuid(1)", DENIED),
    "another group": ("import os\nos.setgroups([1])", DENIED),
    "personality": (c("personality(0x0040000)"), REFUSED),
    "priority": ("import os\nos.setpriority(0, 0, -20)", DENIED),
    "nice": ("import os\nprint(os.nice(5))", DENIED),
    "other cores": ("import os\nos.sched_setaffinity(0, {0})", DENIED),
    "scheduling": (c("sched_setscheduler(0, 1, 0)"), REFUSED),
}
SIGNALS = {
    "signal to the parent": ("import os\nos.kill(os.getppid(), 9)", DENIED),
    "signal to all": ("import os\nos.kill(-1, 9)", DENIED),
    "signal to a group": ("import os\nos.killpg(0, 9)", DENIED),
    "real-time signal": ("import os, signal\nsignal.raise_signal(40)", "rror"),
    "signal to a thread": (c("syscall(234, libc.getppid(), libc.getppid(), 9)"), REFUSED),
    "queued signal": (c("sigqueue(libc.getppid(), 9, 0)"), REFUSED),
    "process descriptor": ("import os\nos.pidfd_open(os.getppid())", DENIED),
    "signal by a descriptor": (
        "import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
        DENIED,
    ),
    "signals blocked": (
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
        "time",
    ),
    "alarm": ("import signal, time\nsignal.alarm(1)\ntime.sleep(9)", "signal 14"),
    "crash": ("import ctypes\nctypes.string_at(0)", "signal 11"),
    "abort": ("import os\nos.abort()", "signal "),
    "a deep stack": (
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
        "",
    ),
}
RESOURCES = {
    "infinite loop": ("while True: pass", "time"),
    "sleep": ("import time\ntime.sleep(1000)", "time"),
    "output closed, then sleep": (
        "import os, time\nos.close(1), os.close(2)\ntime.sleep(1000)",
        "time",
    ),
    "10 GB allocation": ("x = bytearray(10**10)", "MemoryError"),
    "a long list": ("x = [0] * 10**10", "MemoryError"),
    "a list that grows": ("x = [0]\nwhile True: x += x", "MemoryError"),
    "a long text": ("x = 'a' * 10**11", "MemoryError"),
    "a wide field": ("print(f'{1:9999999999}')", "rror"),
    "a map of memory": ("import mmap\nmmap.mmap(-1, 10**11)", "rror"),
    "shared memory that no limit counts": (
        c("mmap(0, ctypes.c_long(4096), 3, 0x21, -1, ctypes.c_long(0))"),
        REFUSED,
    ),
    "memory that is locked": (c("mlockall(3)"), REFUSED),
    "memory file": ("import os\nos.memfd_create('x')", DENIED),
    "limits raised": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nx = bytearray(10**10)",
        "rror",
    ),
    "limits raised by prlimit": (
        "import resource\nresource.prlimit(0, resource.RLIMIT_FSIZE, (-1, -1))",
        DENIED,
    ),
    "limits of the parent": (
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        DENIED,
    ),
    "endless print": ("while True: print('a' * 100)", "output"),
    "endless print past Python": ("import os\nwhile True: os.write(1, b'a' * 9999)", "output"),
    "endless errors": ("import sys\nfor _ in range(9**5): sys.stderr.write('a' * 99)\n3", "3"),
    "endless recursion": ("f = lambda: f()\nf()", "RecursionError"),
    "nested brackets": ("eval('(' * 10**5 + ')' * 10**5)", "rror"),
    "many descriptors": ("x = [open('/dev/null') for _ in range(99)]", "Too many open files"),
    "many pipes": ("import os\nx = [os.pipe() for _ in range(99)]", "Too many open files"),
    "full pipe": ("import os\nos.write(os.pipe()[1], b'a' * 10**6)", "time"),
    "input": ("input()", "EOFError"),
    "epoll": ("import select\nselect.epoll()", DENIED),
    "timer": (c("timer_create(1, 0, 0)"), "-1 "),
    "event descriptor": ("import os\nprint(os.eventfd(0))", DENIED)
    if sys.version_info >= (3, 10)
    else (c("eventfd(0, 0)"), REFUSED),
}
DISK = {
    "large file": ("open('big', 'w').write('x' * 10**8)", "rror"),
    "many large files": (
        "for i in range(9): open(f'{i}', 'wb').write(bytes(10**7))",
        "rror",
    ),
    "many files": ("for i in range(2000): open(f'{i}', 'w')", "rror"),
    "nested folders": (
        "import os\nfor _ in range(3000): os.mkdir('d'), os.chdir('d')",
        "rror",
    ),
    "folder without permissions": ("import os\nos.makedirs('d/e')\nos.mkdir('f', 0)\n3", ""),
    "sparse file": ("open('s', 'wb').truncate(10**15)", "rror"),
    "reserved disk": (
        "import os\nos.posix_fallocate(os.open('f', os.O_RDWR | os.O_CREAT), 0, 10**9)",
        "rror",
    ),
    "links to itself": ("import os\nos.symlink('a', 'a')\nopen('a')", "rror"),
    "many links": (
        "import os\nopen('f', 'w')\nfor i in range(2000): os.link('f', f'{i}')",
        "rror",
    ),
    "a pipe with a name": ("import os\nos.mkfifo('p')", "rror"),
    "a device": ("import os\nos.mknod('d', 0o060666, os.makedev(8, 0))", "rror"),
    "shared memory in a file": ("open('/dev/shm/svpo-hostile', 'w').write('x')", "rror"),
    "attributes": ("import os\nos.setxattr('.', 'user.x', b'1')", DENIED),
    "all data to disk": ("import os\nos.sync()", ""),
    "swap": (c("swapon(b'/f', 0)"), REFUSED),
    "quota": (c("syscall(179, 0, 0, 0, 0)"), REFUSED),
}
FILES = {
    "environment of the parent": (
        "import os\nprint(open(f'/proc/{os.getppid()}/environ').read())",
        DENIED,
    ),
    "own environment": ("print(open('/proc/self/environ').read())", DENIED),
    "own memory": ("print(open('/proc/self/maps').read())", DENIED),
    "memory of the machine": (opened("/dev/mem"), "rror"),
    "messages of the kernel": (opened("/dev/kmsg"), "rror"),
    "terminal": ("open('/dev/tty', 'w').write('x')", "rror"),
    "disk": (opened("/dev/vda"), "rror"),
    "file outside": (opened("/etc/passwd"), DENIED),
    "passwords": (opened("/etc/shadow"), "rror"),
    "this checkout": (opened(str(ROOT / "README.md")), DENIED),
    "its folder": (f"import os\nprint(os.listdir({str(ROOT)!r}))", DENIED),
    "its parent": (f"import os\nprint(os.listdir({str(ROOT.parent)!r}))", DENIED),
    "the environment's folder": (f"import os\nprint(os.listdir({sys.prefix!r}))", DENIED),
    "the environment's settings": (opened(f"{sys.prefix}/pyvenv.cfg"), "rror"),
    "test answers": (opened("SECRET"), "rror"),
    "a link to them": ("import os\nos.symlink('SECRET', 'p')\nprint(open('p').read())", "rror"),
    "a hard link to them": ("import os\nos.link('SECRET', 'p')\nprint(open('p').read())", "rror"),
    "a folder that leads there": (
        "import os\nos.symlink(os.path.dirname('SECRET'), 'd')\nprint(os.listdir('d'))",
        "rror",
    ),
    "a path by a library": (
        "import os\nh = os.open('/usr/lib', 0)\nprint(os.open('../../etc/passwd', 0, dir_fd=h))",
        DENIED,
    ),
    "a handle without access": (
        "import os\nh = os.open('/etc', os.O_PATH)\nprint(os.open('passwd', 0, dir_fd=h))",
        DENIED,
    ),
    "descriptors": (
        "import os\nprint(open('/proc/self/fd/' + str(os.open('/etc/passwd', os.O_PATH))).read())",
        DENIED,
    ),
    "a handle by number": (c("syscall(304, 0, 0, 0)"), REFUSED),
    "copies": (c("sendfile(1, 0, 0, 10)"), REFUSED),
    "copies between files": (c("copy_file_range(0, 0, 1, 0, 10, 0)"), REFUSED),
    "splices": (c("splice(0, 0, 1, 0, 10, 0)"), REFUSED),
    "folder outside": ("import os\nprint(os.listdir('/root'), os.listdir('/home'))", DENIED),
    "root": ("import os\nprint(os.listdir('/'))", DENIED),
    "walk": ("import os\nprint(sum(len(f) for _, _, f in os.walk('/etc')))", "0\n"),
    "another root": ("import os\nos.chroot('.')", DENIED),
    "mount": (c("mount(b'none', b'/mnt', b'tmpfs', 0, 0)"), REFUSED),
    "unmount": (c("umount2(b'/tmp', 2)"), REFUSED),
    "pivot": (c("syscall(155, b'.', b'.')"), REFUSED),
    "mount by a newer call": (c("syscall(428, -100, b'/', 1)"), REFUSED),
    "write outside": ("open('/tmp/../tmp/../etc/svpo-hostile', 'w').write('x')", "rror"),
    "write to a library": ("import os\nopen(os.__file__, 'a').write('x')", DENIED),
    "folder in a library": (
        "import os\nos.mkdir(os.path.dirname(os.__file__) + '/x')",
        "rror",
    ),
    "remove a library": ("import os\nos.remove(os.__file__)", "rror"),
    "rename a library": ("import os\nos.rename(os.__file__, 'x')", "rror"),
    "mode of a file outside": ("import os\nos.chmod('/tmp', 0o700)", DENIED),
    "mode of its own": ("import os\nos.fchmod(1, 0o777)", DENIED),
    "owner of a file outside": ("import os\nos.chown('/tmp', 0, 0)", DENIED),
    "times of a file outside": ("import os\nos.utime('/tmp')", DENIED),
    "attribute of a file outside": ("import os\nos.setxattr('/tmp', 'user.x', b'1')", DENIED),
    "attribute by a newer call": (c("syscall(463, -100, b'/tmp', 0, b'user.x', 0, 0)"), REFUSED),
    "flags of a file": (
        "import fcntl, os\nfcntl.ioctl(os.open('.', os.O_RDONLY), 0x40086602, b'12345678')",
        "rror",
    ),
}
SIBLINGS = {  # ways for two programs of one tick to tell each other something
    "socket": ("import socket\nsocket.create_connection(('1.1.1.1', 53))", DENIED),
    "datagram": ("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)", DENIED),
    "local socket": ("import socket\nsocket.socket(socket.AF_UNIX)", DENIED),
    "pair of sockets": ("import socket\nsocket.socketpair()", DENIED),
    "netlink": ("import socket\nsocket.socket(16, socket.SOCK_RAW)", DENIED),
    "names": ("import socket\nsocket.gethostbyname('example.org')", "rror"),
    "web": ("import urllib.request as u\nu.urlopen('http://example.org')", "rror"),
    "shared memory": (c("shmget(1, 4096, 0o1600)"), REFUSED),
    "messages": (c("msgget(1, 0o1600)"), REFUSED),
    "semaphore": (c("semget(1, 1, 0o1600)"), REFUSED),
    "message queue": (c("syscall(240, b'/q', 66, 0o600, 0)"), REFUSED),
    "lock of a library": ("import fcntl, os\nfcntl.flock(os.open('/usr/lib', 0), 2)", DENIED),
    "lock of a device": (
        "import fcntl, os\nfcntl.lockf(os.open('/dev/null', os.O_RDWR), fcntl.LOCK_EX)",
        DENIED,
    ),
    "who holds a lock": (
        "import fcntl, os\nfcntl.fcntl(os.open('/dev/null', 2), fcntl.F_GETLK, bytes(32))",
        DENIED,
    ),
    "lease": (
        "import fcntl, os\nfcntl.fcntl(os.open('/usr/lib', 0), fcntl.F_SETLEASE, 0)",
        DENIED,
    ),
    "notes on a folder": (
        "import fcntl, os\nfcntl.fcntl(os.open('/usr/lib', 0), fcntl.F_NOTIFY, 1)",
        DENIED,
    ),
    "watches": (c("inotify_init()"), REFUSED),
    "watches of all": (c("syscall(300, 0, 0)"), REFUSED),
    "free disk": ("import os\nos.statvfs('/')", DENIED),
    "free memory": (c("sysinfo(ctypes.create_string_buffer(200))"), REFUSED),
    "a shared library": (
        "import json, mmap\nf = open(json.__file__, 'rb')\nmmap.mmap(f.fileno(), 0, access=1)",
        DENIED,
    ),
    "a wake across processes": (c("syscall(202, 0, 1, 1, 0, 0, 0)"), REFUSED),
    "open files of others": ("import os\nprint(os.stat(f'/proc/{os.getppid()}/fd'))", "rror"),
    "keys": (c("syscall(248, b'user', b'a', b'b', 1, -3)"), REFUSED),
    "io_uring": (c("syscall(425, 1, 0)"), REFUSED),
    "bpf": (c("syscall(321, 0, 0, 0)"), REFUSED),
    "counters": (c("syscall(298, 0, 0, -1, -1, 0)"), REFUSED),
    "page faults": (c("syscall(323, 0)"), REFUSED),
    "comparison of processes": (c("syscall(312, 1, 1, 0, 0, 0)"), REFUSED),
    "the name of the host": (c("sethostname(b'x', 1)"), REFUSED),
    "the clock": ("import time\ntime.clock_settime(0, 0)", DENIED),
    "a restart": (c("reboot(0x1234567)"), REFUSED),
    "the log of the kernel": (c("syscall(103, 3, 0, 0)"), REFUSED),
    "ports": (c("iopl(3)"), "-1 "),
    "a file by its number": (c("syscall(303, -100, b'/etc', 0, 0, 0)"), REFUSED),
    "events of all files": (c("syscall(301, 0, 0, 0, 0, 0)"), REFUSED),
    "asynchronous files": (c("syscall(206, 1, 0)"), REFUSED),
    "signals as files": (c("syscall(289, -1, 0, 8, 0)"), REFUSED),
    "timers as files": (c("timerfd_create(1, 0)"), REFUSED),
}
PYTHON = {
    "closed output": ("import sys\nwith sys.stdout as f: pass\nprint(3)", ""),
    "all descriptors closed": ("import os\nos.closerange(0, 99)\nprint(3)", ""),
    "error that fails": ("class E(Exception):\n    def __str__(self): raise E\nraise E", "E\n"),
    "surrogates": ("raise ValueError(chr(0xd800))", "ValueError"),
    "status 1": (
        "import os, sys\nsys.stderr.write('x' * 10**7)\nsys.stderr.flush()\nos._exit(1)",
        "",
    ),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "its own code": ("import tasks", "ModuleNotFoundError"),
    "the caller's names": ("import __main__\nprint(__main__.SECONDS)\nconfine()", "NameError"),
    "a filter of its own": (c("syscall(317, 1, 0, 0)"), REFUSED),
    "more rules": (c("syscall(446, 0, 0)"), REFUSED),
    "machine code": (
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, flags=34, prot=7)\n"
        "m.write(b'\\xb8\\x39\\x00\\x00\\x00\\x0f\\x05\\xc3')\n"
        "print(ctypes.CFUNCTYPE(ctypes.c_long)("
        "ctypes.addressof(ctypes.c_char.from_buffer(m)))())",
        "-1\n",  # fork, as -EPERM
    ),
    "calls of 32 bits": (
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, flags=34, prot=7)\n"
        "m.write(b'\\xb8\\x02\\x00\\x00\\x00\\xcd\\x80\\xc3')\n"
        "print(ctypes.CFUNCTYPE(ctypes.c_long)("
        "ctypes.addressof(ctypes.c_char.from_buffer(m)))())",
        "signal ",
    ),
    "calls of x32": (c("syscall(0x40000000 + 57)"), REFUSED),
}
HOSTILE = PROCESSES | SIGNALS | RESOURCES | DISK | FILES | SIBLINGS | PYTHON
ON_X86 = platform.machine() == "x86_64"
NUMBERED = {name for name, (code, _) in HOSTILE.items() if "syscall(" in code or "xb8" in code}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_is_contained(name, monkeypatch, tmp_path):
    """Catches a limit that does not hold."""
    if name in NUMBERED and not ON_X86:
        pytest.skip("the numbers of calls are those of x86_64")
    monkeypatch.setenv("SECRET", "geheim")
    (tmp_path / "answers.jsonl").write_text("geheim")
    code, held = HOSTILE[name]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # to see that nothing is left there
    begin = time.monotonic()
    printed, limit = run([code.replace("SECRET", str(tmp_path / "answers.jsonl"))])
    assert held in (limit or printed), (printed, limit)
    assert time.monotonic() - begin < 30
    assert not any(word in printed for word in ("root:", "geheim", "usr\n", "SVPO"))
    for folder in ("/tmp", "/etc", "/dev/shm"):
        assert not os.path.exists(f"{folder}/svpo-hostile")
    assert os.listdir(tmp_path) == ["answers.jsonl"]
    if held in ("time", "output", "signal "):
        assert limit


def test_no_other_call_is_allowed():
    """Catches a system call that is not in the list and is not refused."""
    column, _ = sandbox.MACHINES[platform.machine()]
    tables = [numbers for numbers in sandbox.ALLOWED.values() if column < len(numbers)]
    listed = {numbers[column] for numbers in tables}
    listed |= {numbers[column] for numbers, *_ in (*sandbox.ARGUMENTS, *sandbox.BITS)}
    # uretprobe and uprobe of x86_64: filters do not see them, they end a process that calls them
    listed |= {335, 336}
    others = [number for number in range(600) if number not in listed]
    tries = f"[n for n in {others} if libc.syscall(n, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1]"
    assert run([LIBC + f"print({tries})"]) == ("[]\n", "")
    fcntl = sandbox.ARGUMENTS[0][0][column]
    code = (
        f"{LIBC}refused = lambda c: libc.syscall({fcntl}, 99, c, 0) and ctypes.get_errno() == 1\n"
    )
    code += "print([command for command in range(50) if not refused(command)])"
    assert run([code])[0] == "[0, 1, 2, 3, 4]\n"
    if conftest.LONG:
        for number in random.Random(0).sample(others, 200):
            printed, _ = run([LIBC + f"print(libc.syscall({number}, 1, 1, 1, 1, 1, 1))"])
            assert printed == "-1\n", number


def test_code_without_a_folder(tmp_path):
    """Catches code that may write files where no namespace bounds and removes them."""
    program = (
        "import os\nfrom tasks import sandbox\nsandbox.PLACES = ()\nsandbox.confine()\n"
        "print(os.getcwd())\n"
        "for path in ('f', '/tmp/f', '/dev/shm/f', os.environ['FOLDER'] + '/f'):\n"
        "    try:\n        open(path, 'w')\n"
        "    except OSError as error:\n        print(error.strerror)\n"
        "import fractions\nprint(fractions.Fraction(6, 4))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "FOLDER": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.stdout == "/\n" + "Permission denied\n" * 4 + "3/2\n", found.stderr


def test_files_of_a_block():
    """Catches a folder that is shared between blocks, or in which nothing can be written."""
    code = "import os, tempfile\nprint(os.listdir())\nopen('f', 'w').write('6')\n"
    code += "print(open('f').read(), os.getcwd() == tempfile.gettempdir() == os.environ['HOME'])"
    printed, _ = run([code])
    if "Permission" in printed:
        pytest.skip("no mount namespace can be made here")
    assert printed == run([code])[0] == "[]\n6 True\n"
