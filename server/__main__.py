"""Serve hello: `python -m server` does what `gunicorn hello:application` does, and checks WEB_CONCURRENCY before.

gunicorn itself reads that variable before it reads its configuration, and ends with a traceback where it is no number.
"""

import runpy
import sys

from server import settings

if __name__ == "__main__":
    assert settings.WEB_CONCURRENCY  # checked by the import
    sys.argv.insert(1, "hello:application")
    runpy.run_module("gunicorn", run_name="__main__", alter_sys=True)
