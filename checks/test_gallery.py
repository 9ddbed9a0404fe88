"""Every known bug is noticed when it is put back in."""

import pytest

from checks.gallery import GALLERY, HERE, run_test, source_patched


@pytest.mark.parametrize(
    "bug", GALLERY, ids=[f"{b.number}-{b.what[:40].replace(' ', '_')}" for b in GALLERY]
)
def test_gallery_every_known_bug_is_noticed_when_put_back_in(bug, monkeypatch):
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "gallery")
    with source_patched(bug.file, bug.right, bug.wrong) as tests:
        noticed = (AssertionError, ValueError, RuntimeError, IndexError, pytest.fail.Exception)
        with pytest.raises(noticed) as failure:
            run_test(tests[bug.test])
    assert not isinstance(failure.value, NotImplementedError | NameError)


def test_gallery_covers_all_bugs_and_readme_lists_them():
    assert {bug.number for bug in GALLERY} == set(range(1, 35))
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert all(
        f"| {bug.number} | {bug.what} | {bug.seen} | `{bug.test}` |" in readme for bug in GALLERY
    )
