"""Names with numbers in them, in the order in which a reader counts."""

from bridge.peft.natural_order import natural_key


def test_layer_2_comes_before_layer_10():
    wanted = ["h.2.fc", "h.10.attn", "h.10.fc", "layers.2.k_proj", "layers.10.k_proj"]
    assert sorted(reversed(wanted), key=natural_key) == wanted


def test_numbers_within_a_word_count_too_and_other_digits_are_letters():
    assert sorted(["conv10", "conv9", "conv"], key=natural_key) == ["conv", "conv9", "conv10"]
    assert sorted(["a.\u00b2", "a.1"], key=natural_key) == ["a.1", "a.\u00b2"]
