"""The contract of the C++ core: every entry of csrc/bindings/module.cpp, with shapes, dtypes and errors.

Every function releases the interpreter's lock. A file that cannot be opened raises OSError; wrong content
raises InputError with one sentence.
"""

class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence, to be shown as it is."""
