"""Runs commands of the official CLI one after another in one process: importing the client costs a second each time.

stdin: a JSON list of argument lists; stdout: a JSON list of (exit status, what it printed).
"""

import contextlib
import io
import json
import sys

from modal.__main__ import main

outcomes = []
for arguments in json.load(sys.stdin):
    printed, status = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True), 0
    sys.argv = ["modal", *arguments]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main()
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                printed.write(error.code)
    outcomes.append((status, printed.buffer.getvalue().decode()))
json.dump(outcomes, sys.stdout)
