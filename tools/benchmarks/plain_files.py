"""Plain reading and writing by several processes: what a disk can do with so many bytes. Pieces of 4 MiB, fsync included."""
import mmap
import multiprocessing
import os
import time

PIECE = 4 << 20


def forget(files):
    """What is on the disk is dropped from the page cache."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def together(processes, work):
    """Seconds until the last of the processes has done work(its number)."""
    fork = multiprocessing.get_context("fork")
    start = time.monotonic()
    children = [fork.Process(target=work, args=(number,)) for number in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    seconds = time.monotonic() - start
    if any(child.exitcode for child in children):
        raise OSError("plain reading or writing fails: see above")
    return seconds


def pieces(size, number, processes):
    """(offset, bytes) of a process's share of a file: whole pieces in one run, but for the file's last."""
    count = -(-size // PIECE)
    for piece in range(count * number // processes, count * (number + 1) // processes):
        yield piece * PIECE, min(PIECE, size - piece * PIECE)


def read(files, processes):
    """Seconds for all bytes of the files, which come from the disk."""
    forget(files)

    def work(number):
        memory = mmap.mmap(-1, PIECE)
        for path in files:
            file = os.open(path, os.O_RDONLY)
            for offset, size in pieces(os.fstat(file).st_size, number, processes):
                if os.preadv(file, [memoryview(memory)[:size]], offset) != size:
                    raise OSError(f"{path}: a short read")
            os.close(file)

    return together(processes, work)


def write(path, size, processes, direct):
    """Seconds for one new file of so many bytes, and its fsync. `direct`: past the page cache, in whole pages. The file is removed again."""
    memory = mmap.mmap(-1, PIECE)   # begins on a page, as O_DIRECT wants it
    memory.write(os.urandom(PIECE))
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE

    def work(number):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0), 0o644)
        for offset, count in pieces(whole if direct else size, number, processes):
            if os.pwrite(file, memoryview(memory)[:count], offset) != count:
                raise OSError(f"{path}: a short write")
        os.fsync(file)
        os.close(file)

    try:
        return together(processes, work)
    finally:
        if path.exists():
            path.unlink()
