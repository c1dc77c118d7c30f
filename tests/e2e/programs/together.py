"""Runs checks side by side: most of their time they wait."""

import traceback
from concurrent.futures import ThreadPoolExecutor


def together(*checks) -> None:
    failed = []

    def run(check) -> None:
        try:
            check()
        except BaseException:
            failed.append(f"{check.__name__} failed:\n{traceback.format_exc()}")

    with ThreadPoolExecutor(len(checks)) as pool:
        list(pool.map(run, checks))
    if failed:
        raise AssertionError("\n".join(failed))
