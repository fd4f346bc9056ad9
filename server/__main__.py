"""Run `gunicorn hello:application` after a check of WEB_CONCURRENCY: `python -m server`.

gunicorn reads that variable before its configuration, and exits with a traceback if it is not a number.
"""

import runpy
import sys

from server import settings

if __name__ == "__main__":
    assert settings.WEB_CONCURRENCY  # checked by the import
    sys.argv.insert(1, "hello:application")
    runpy.run_module("gunicorn", run_name="__main__", alter_sys=True)
