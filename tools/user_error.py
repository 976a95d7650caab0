"""What the user can put right, as one message and exit code 2; what else ends a tool, as tools' users expect it."""
import errno
import sys

FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file may not grow any further"}


class UserError(Exception):
    """One clear message: the file, key or numbers, and what to do."""


def run(tool, main):
    """Runs main() and ends the process: 0, 2 with the message of a UserError, 130 after Ctrl-C. A disk without room and files that
    can't be opened or read are the user's, too."""
    try:
        main()
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        message = f"{error.filename or 'writing'}: {error.strerror}"
    except KeyboardInterrupt:
        print(f"\n{tool}: stopped", file=sys.stderr)
        sys.exit(130)
    else:
        return
    print(f"{tool}: {message}", file=sys.stderr)
    sys.exit(2)
