"""What the Python tests of this folder begin with."""
import shutil
import subprocess
import sys


def skip_without_gpu():
    """Leaves with 77, CTest's Skipped, where there is no GPU."""
    if not shutil.which("nvidia-smi") or subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode != 0:
        print("no GPU here: skipped")
        sys.exit(77)
