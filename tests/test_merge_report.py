"""The report of a merge: a table, with a warning where updates were lost."""

from bridge.peft.merging.report import MergeReport, MergeRow


def row(**more):
    values = {"max_error": 1e-3, "mean_error": 1e-4, "unchanged": 0.0, "relative_update": 0.1}
    return MergeRow(**({"fqn": "layer"} | values | more))


def test_report_prints_a_table_and_warns_of_lost_updates():
    quiet = MergeReport((row(), row(fqn="other", unchanged=0.4)))
    assert not quiet.lost
    assert "warning" not in str(quiet)
    assert str(quiet).splitlines()[2].split() == [
        "layer",
        "1.00e-03",
        "1.00e-04",
        "0.0%",
        "1.00e-01",
    ]
    loud = MergeReport((row(), row(fqn="other", unchanged=0.6)))
    assert loud.lost == ("other",)
    assert "warning: in 1 of 2 layers more than half of the update" in str(loud)
    assert loud.to_dict()["lost"] == ["other"]
    assert loud.to_dict()["rows"][0]["fqn"] == "layer"
