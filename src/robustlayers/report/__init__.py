"""Reports of studies: tables, figures, one self-contained page, its Markdown twin, and CSV behind every figure."""

from __future__ import annotations

from pathlib import Path

from robustlayers.study.summary import Summary

__all__ = ["write"]


def write(summary: Summary, folder: Path) -> Path:
    """Write the report of a study into `folder` and return the path of its page, `folder/report.html`.

    Beside the page: `report.md` with the same content, `figures/NAME.svg` (or `.png`) each with the numbers behind it as
    `figures/NAME.csv`, `rows.csv` with every measured number, and `claims.csv` where the study makes claims. The page
    needs none of them, and no network. It is written last, so where it is there, the report is whole; the same summary
    gives the same bytes.
    """
    # Drawing takes a second to import and is needed here only.
    from robustlayers.core.files import write_bytes, write_text
    from robustlayers.report import files, markdown, page
    from robustlayers.report.content import gather
    from robustlayers.report.svg import for_file

    folder = Path(folder)
    content = gather(summary)
    write_text(folder / "rows.csv", files.rows_csv(summary))
    if summary.claims:
        write_text(folder / "claims.csv", files.claims_csv(summary))
    for one in content.drawings:
        write_text(folder / "figures" / f"{one.name}.csv", files.csv_text(one.data))
        if one.png:
            write_bytes(folder / "figures" / f"{one.name}.png", one.png)
        else:
            write_text(folder / "figures" / f"{one.name}.svg", for_file(one.svg, one.title))
    write_text(folder / "report.md", markdown.render(content))
    return write_text(folder / "report.html", page.render(content))
