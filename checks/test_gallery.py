"""Every known bug is noticed when it is put back in."""

import sys

import pytest

from checks.gallery import GALLERY, PAGE, is_ours, page, run_test, source_patched

NOTICED = (AssertionError, ValueError, RuntimeError, IndexError, OSError, SystemExit)
NOTICED += (pytest.fail.Exception,)
BROKEN = (NameError, NotImplementedError, ImportError)  # a patch that is itself at fault


@pytest.mark.parametrize(
    "bug", GALLERY, ids=[f"{bug.number}-{bug.what[:40].replace(' ', '_')}" for bug in GALLERY]
)
def test_a_known_bug_is_noticed_when_put_back_in(bug, monkeypatch):
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "gallery")
    with source_patched(bug.file, bug.right, bug.wrong) as tests:
        with pytest.raises(NOTICED) as failure:
            run_test(tests[bug.test])
        assert not isinstance(failure.value, BROKEN)


def test_a_patch_reaches_what_is_loaded_within_and_leaves_nothing_behind():
    ours = lambda: {name: module for name, module in sys.modules.items() if is_ours(name)}
    before, finders = ours(), list(sys.meta_path)
    with pytest.raises(KeyError), source_patched("lora.py", "PREFIX = ", "NEW = PREFIX = "):
        from runner import tune  # which no test has loaded

        assert sys.modules["lora"].NEW and tune in ours().values()
        assert not any(module in before.values() for module in ours().values())
        raise KeyError
    assert ours() == before and sys.meta_path == finders
    with pytest.raises(AssertionError, match="'no such text' 0 times"):
        source_patched("lora.py", "no such text", "").__enter__()


def test_the_numbers_of_the_bugs_are_complete_and_in_order():
    numbers = [bug.number for bug in GALLERY]
    assert numbers == sorted(numbers) and set(numbers) == set(range(1, 121))


def test_the_page_lists_every_bug_as_the_gallery_has_it():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m checks.gallery writes it anew"
