import pytest

from crosstill import balance
from crosstill.errors import ConfigError


def test_names_are_those_of_the_files():
    assert balance.known() == sorted(balance.known())
    assert {"fixed", "dsmd", "dsmd_scaled", "dwa", "uncertainty"} <= set(balance.known())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dmsd", {}, "no balancer named 'dmsd'; did you mean 'dsmd'"),
        ("dsmd", {"temprature": 1}, "balancer 'dsmd' has no option 'temprature'; did you mean"),
        ("dsmd", {"temperature": 0}, "temperature must be above 0"),
        ("dsmd", {"total": -1}, "total must be above 0"),
        ("dsmd", {"smoothing": 1}, "smoothing must be from 0 to below 1"),
        ("dsmd_scaled", {"eps": 0}, "eps must be above 0"),
        ("dwa", {"temperature": "2"}, "should be a valid number"),
        ("fixed", {"weights": {"x": 1}}, "no loss to weigh named 'x'"),
        ("fixed", {"weights": {"a": -1}}, "weight of a must be 0 or above"),
        ("uncertainty", {"x": 1}, "it has none, remove it"),
    ],
)
def test_wrong_input_is_one_clear_line(name, options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        balance.build(name, ["a", "b"], **options)
    assert "\n" not in str(caught.value)
