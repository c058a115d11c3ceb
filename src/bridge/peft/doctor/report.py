"""What a check-up found: one line a check, each with the fix."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from bridge.peft.text_table import table

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was looked at.
        status: `"pass"`, `"warn"`, `"fail"`, or `"skip"` where it could not be looked at.
        detail: What was found.
        fix: What to do about it; empty where nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """All checks of one check-up, in the order in which they were made; prints as a table."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether no check failed; warnings are not failures."""
        return all(check.status != "fail" for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return {check.name: check for check in self.checks}[name]

    def to_dict(self) -> dict[str, Any]:
        """The checks and the verdict, ready for JSON."""
        return {"healthy": self.healthy, "checks": [asdict(check) for check in self.checks]}

    def __str__(self) -> str:
        rows = [(check.status.upper(), check.name, check.detail) for check in self.checks]
        fixes = [f"{check.name}: {check.fix}" for check in self.checks if check.fix]
        counts = Counter(check.status for check in self.checks)
        summary = ", ".join(f"{counts[s]} {s}" for s in get_args(Status) if counts[s])
        return "\n".join([*table(("", "check", "found"), rows), *fixes, "", summary])


def verdict(
    name: str,
    bad: list[str],
    total: int,
    found: str,
    fix: str,
    *,
    good: str,
    status: Status = "fail",
) -> Check:
    """A check that passes, saying `good`, unless it found something bad in some of the modules."""
    if bad:
        return Check(name, status, f"{found} {some(bad, total)}", fix)
    return Check(name, "pass", good)


def some(names: list[str], total: int) -> str:
    """`"3 of 28 (first: model.layers.0.….q_proj)"`."""
    return f"{len(names)} of {total} (first: {names[0]})"
