"""The plain parts of every program here: errors in one line, progress, signals, files written whole or not at
all."""

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path


class UserError(ValueError):
    """Something the user can mend, printed as one line: `error: <what>: <found> vs <expected>. <what to
    do>.`"""


class Skip(UserError):
    """A source that cannot be used: Skip(reason, detail). Reasons are counted, details go to the report."""

    def __str__(self):
        return f"{self.args[0]}: {self.args[-1]} vs a talking face with its sound. Try another file"


def printable(text):
    """A path or text that any file and terminal takes: bytes of a name that are no UTF-8 become \\xe9."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# erases a progress line; a program without a window has no stdout
CLEAR = "\r\033[K" if sys.stdout and sys.stdout.isatty() else ""


def write_atomically(path, write):
    """write(temporary path), then rename: a full disk or a kill leaves the old file as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"{path}: not written ({e}) vs a writable place with room. What was there is kept")
    finally:
        temporary.unlink(missing_ok=True)


class Interrupt:
    """Ctrl-C and kill ask for a stop after the step under way; a second Ctrl-C stops at once. In a thread
    there is nothing to ask: only a program's main thread may handle signals."""

    def __enter__(self):
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
        self.signal, self.old = 0, {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def _ask(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def newest(name):
    """The files of this name in the run folders under runs/, the newest first."""
    return sorted(Path("runs").glob(f"*/{name}"), key=lambda path: path.stat().st_mtime, reverse=True)


def free_name(path):
    """path, or path with the first free number."""
    names = [path] + [path.with_stem(f"{path.stem}-{i}") for i in range(2, 10000)]
    return next(name for name in names if not name.exists())


def bounded(kind, low, high=math.inf):
    """An argparse type: a finite number from low to high."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    convert.__name__ = kind.__name__
    return convert


class Lasting:
    """A stream that work outlives: once its reader has gone, or its disk is full, what is printed is lost."""

    def __init__(self, stream):
        self.stream = stream

    def _try(self, do, *args):
        try:
            return do(*args)
        except OSError:  # the same file from now on leads nowhere, for what still waits in its buffer too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def write(self, text):
        return self._try(self.stream.write, text)

    def flush(self):
        return self._try(self.stream.flush)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting_output():
    """Whatever happens to stdout and stderr (`train | head -1`) ends the pipe and not the work."""
    out, err = (stream and Lasting(stream) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


def run_command(args, end="."):
    """args.run(args) -> exit status; an error is one line on stderr, with --debug its traceback."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal that is not UTF-8 shows \\xe9 instead of ending the program
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return args.run(args)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as e:
        if args.debug:
            raise
        if not isinstance(e, UserError):
            found = f"{e.filename or 'a file'}: {e.strerror or e}"
            e = f"{found} vs one that can be read and written. Free some space or choose another place"
        print(f"{CLEAR}error: {str(e).rstrip('.')}{end}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


class Progress:
    """One line that says how far and how long still: rewritten in place on a terminal, else every 15
    seconds."""

    def __init__(self, what, total):
        self.what, self.total, self.done, self.begin, self.shown = what, total, 0, time.time(), 0.0

    def __call__(self, done, note=""):
        self.done, now = done, time.time()
        tty = sys.stdout and sys.stdout.isatty()
        if done < self.total and now - max(self.shown, self.begin) < (0.2 if tty else 15):
            return
        self.shown = now
        left = (now - self.begin) / max(done, 1) * (self.total - done)
        line = f"{self.what} {done:,} of {self.total:,}{note}, {left // 60:.0f} min {left % 60:02.0f} s left"
        print(
            f"\r{line:<100}" if tty else line, end="\n" if done >= self.total or not tty else "", flush=True
        )
