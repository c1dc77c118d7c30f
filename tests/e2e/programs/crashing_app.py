"""Classes whose containers never get going."""

import os

import modal

app = modal.App("crashing")


@app.cls()
class Raises:
    @modal.enter()
    def load(self):
        print("looking for the model", flush=True)
        raise FileNotFoundError("there is no model")

    @modal.method()
    def answer(self):
        return 42


@app.cls()
class Exits:
    @modal.enter()
    def load(self):
        print("the licence has expired", flush=True)
        os._exit(7)

    @modal.method()
    def answer(self):
        return 42
