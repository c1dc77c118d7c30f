"""What Python an image has. Imported by `step.py`; PROBE runs in the image's own interpreter (3.6 and newer)."""

import os

NAMES = ("python", "python3")
PROBE = """\
import json, platform, re, sys, os
packages = {}
for folder in sys.path:
    if not os.path.isdir(folder) or not folder.endswith("-packages"):
        continue
    for name in sorted(os.listdir(folder)):
        found = re.match(r"(.+?)-([^-]+)(-py[0-9.]+)?\\.(dist|egg)-info$", name)
        if found:
            packages.setdefault(found.group(1).replace("_", "-"), found.group(2))
libc = " ".join(platform.libc_ver()).strip() or "musl"
print(json.dumps({"version": sys.version.split()[0], "libc": libc, "packages": packages}))
"""


def find_python(path):
    """The first interpreter on that PATH (links are kept: a virtual environment is known by its own path), or None."""
    for folder in path.split(":"):
        for name in NAMES:
            place = os.path.join(folder, name)
            if folder.startswith("/") and os.access(place, os.X_OK) and not os.path.isdir(place):
                return place
    return None
