"""Calls, driven by the official client."""


def test_remote_and_map_return_what_the_function_returns(aeolian, tmp_path):
    output = aeolian.run_app(
        """
        import modal

        app = modal.App("squares")

        @app.function()
        def square(x):
            print("squaring", x)
            return x * x

        @app.local_entrypoint()
        def main():
            assert square.remote(7) == 49
            assert square.local(7) == 49
            assert list(square.map(range(100))) == [x * x for x in range(100)]
            print("all is well")
        """,
        tmp_path,
    )
    assert "all is well" in output
    assert "squaring 7\n" in output
