"""The exceptions a user of `bridge.peft` can meet, each also the builtin a caller expects.

AdapterError (ValueError)             anything about an adapter that the caller can fix
├── TargetError                       a target matches nothing, or nothing that can be adapted
├── AdapterFileError                  a file is damaged, hostile, or does not fit the model
└── AlreadyAdaptedError               … and AssertionError: adapted or patched before
UnsupportedLinearError                NotImplementedError and AssertionError: cannot be adapted
MissingExtraError (ImportError)       an optional package is not installed
"""

from __future__ import annotations


class AdapterError(ValueError):
    """Anything about an adapter that the caller can fix; the message says how."""


class TargetError(AdapterError):
    """A target pattern that matches nothing, or nothing that can be adapted."""


class AdapterFileError(AdapterError):
    """An adapter file that is damaged, hostile, or does not fit the model."""


class UnsupportedLinearError(NotImplementedError, AssertionError):
    """The module is not a linear that can be adapted.

    Both a `NotImplementedError` and an `AssertionError`, because callers of either exist.
    """


class AlreadyAdaptedError(AdapterError, AssertionError):
    """The module already carries an adapter (or foreign patching); it is left as it was."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the extra to install."""
