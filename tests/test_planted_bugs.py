"""Every fault planted into a kernel is found, and by a message of its kind; kernels without one give no report."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_on_host import bugs, build, driver


@pytest.fixture(scope="module")
def found(figures):
    """All planted bugs under their builds, run once."""
    results = bugs.try_out_all()
    for variant in build.VARIANTS:
        figures[f"planted kernel bugs found by the {variant} build"] += sum(variant in f.by for f in results.values())
    figures["planted kernel bugs"] += len(results)
    figures["planted kernel bugs found"] += sum(bool(f.by) for f in results.values())
    return results


@pytest.fixture(scope="module")
def clean():
    """All cases on the kernels as they are."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(driver.CASES, pool.map(bugs.try_out, driver.CASES), strict=True))


@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug.name)
def test_the_bug_is_found(found, bug):
    assert found[bug].by, f"no build finds {bug.name}"
    assert found[bug].of_its_kind(bug.kind), (bug.kind, found[bug].says)


@pytest.mark.parametrize("case", driver.CASES)
def test_kernels_without_a_bug_give_no_report(clean, case):
    assert clean[case].by == [], clean[case].says


def test_there_is_a_bug_of_every_kind():
    assert {bug.kind for bug in bugs.BUGS} == set(bugs.KINDS)
    assert len({bug.name for bug in bugs.BUGS}) == len(bugs.BUGS)
    assert set(bugs.SOURCES) == set(driver.CASES)


def test_a_bug_whose_text_is_not_there_is_an_error():
    absent = bugs.Bug("absent", "deadlock", "handoff", "no such text", "")
    with pytest.raises(ValueError, match="0 times"):
        absent.plant()


def test_the_published_table_is_of_these_bugs():
    table = json.loads(bugs.RESULTS.read_text())
    assert [row["bug"] for row in table["rows"]] == [bug.name for bug in bugs.BUGS]
    assert table["found"] == table["bugs"] == len(bugs.BUGS)
