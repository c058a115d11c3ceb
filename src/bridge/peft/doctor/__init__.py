"""A check-up of a model, an adapter, or the two together: `doctor`."""

from bridge.peft.doctor.check_up import doctor
from bridge.peft.doctor.report import Check, DoctorReport

__all__ = ["Check", "DoctorReport", "doctor"]
