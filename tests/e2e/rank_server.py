"""Programs that are loaded once and then forked for each start: rank_server.c."""
import atexit
import functools
import os
import subprocess
import tempfile
import time
from pathlib import Path

LIBRARY = os.environ.get("UPCYCLE_RANK_SERVER")   # as_rank lies beside it


@functools.cache
def served(program, preload=()):
    """What to start in the place of `program`, by itself or under mpirun, where nobody sends it signals and how it is loaded does not matter.
    Without $UPCYCLE_RANK_SERVER that is the program itself."""
    if not LIBRARY:
        return str(program)
    scratch = tempfile.TemporaryDirectory()
    start = Path(scratch.name) / Path(program).name
    start.symlink_to(Path(LIBRARY).with_name("as_rank"))
    socket = f"{start}.socket"
    server = subprocess.Popen([program], stdin=subprocess.PIPE,   # which ends when this process does
                              env=os.environ | {"LD_PRELOAD": " ".join([LIBRARY, *preload]), "RANK_SERVER_AT": socket})

    def close():
        server.stdin.close()
        server.wait()
        scratch.cleanup()
    atexit.register(close)
    while not os.path.exists(socket):
        assert server.poll() is None, f"the server of {program} did not start"
        time.sleep(0.01)
    return str(start)
