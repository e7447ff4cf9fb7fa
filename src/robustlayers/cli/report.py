"""`robustlayers report`: draw the report of a study's folder again, complete or not."""

from __future__ import annotations

from robustlayers.cli.arguments import StudyFolder

__all__ = ["report"]


def report(folder: StudyFolder) -> int:
    """Write the report from what was measured so far and print its path; nothing is trained."""
    from robustlayers.report import write
    from robustlayers.study.collect import collect
    from robustlayers.study.store import Store

    store = Store(folder)
    print(f"report: {write(collect(store), store.report)}")
    return 0
