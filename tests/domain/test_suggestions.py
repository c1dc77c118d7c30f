import pytest

from aeolian.domain.suggestions import instead_of, nearest


@pytest.mark.parametrize(
    ("name", "names", "hint"),
    [
        ("helo", ["hello", "goodbye"], ": did you mean 'hello'?"),
        ("HELLO", ["Hello"], ": did you mean 'Hello'?"),
        ("unlike", ["b", "a"], " (there are: a, b)"),
        ("unlike", ["a"], " (there is: a)"),
        (
            "unlike",
            [f"n{i:02}" for i in range(12)],
            " (there are: " + ", ".join(f"n{i:02}" for i in range(10)) + ", …)",
        ),
        ("unlike", [], ""),
    ],
)
def test_a_wrong_name_is_answered_by_the_nearest_or_by_all(name, names, hint):
    assert instead_of(name, names) == hint


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("shop.sell", ["shop/sell"]),
        ("shop::sell", ["shop/sell"]),
        ("Shop/Sell", ["shop/sell"]),
        ("shop/sel", ["shop/sell", "shop/self"]),
        ("lumberyard/dogg", ["lumberyard/dig"]),
        ("sho", ["shop/self", "shop/sell"]),
        ("other", []),
        ("", []),
    ],
)
def test_references_are_found_by_case_separator_likeness_and_beginning(name, near):
    found = nearest(name, ["shop/sell", "shop/self", "lumberyard/dig", "lumberyard/uproot"], 2)
    assert sorted(found) == sorted(near)
