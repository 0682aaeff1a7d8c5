"""What happened to the logs, in numbers: kept while they are read, told at the end, written beside the output."""

from __future__ import annotations

from collections import Counter
from typing import Any


class Counts(Counter[str]):
    """Counters by name. Names with a dot belong together: `masked.ip`, `rows.completion`."""

    def of(self, prefix: str) -> dict[str, int]:
        """The counters `prefix.NAME`, by NAME; the largest first."""
        found = {name.removeprefix(f"{prefix}."): n for name, n in self.items() if name.startswith(f"{prefix}.") and n}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def summary(self) -> dict[str, Any]:
        """Nested, for JSON."""
        told: dict[str, Any] = {}
        for name in sorted(self):
            first, _, rest = name.partition(".")
            if rest:
                told.setdefault(first, {})[rest] = self[name]
            else:
                told[first] = self[name]
        return told

    def text(self) -> str:
        """Some lines for people."""
        n = self
        lines = [
            f"read: {n['files']:,} files, {n['bytes']:,} bytes, {n['lines']:,} lines; {n['records']:,} records, "
            f"{n['lines_joined']:,} lines joined to the one before"
        ]
        lines += [f"not read: {files:,} files, {what}" for what, files in self.of("files_skipped").items()]
        odd = {
            "binary_blobs": "binary blobs skipped",
            "binary_bytes": "bytes in them",
            "lines_fallback": "lines that are no UTF-8, read as Windows-1252",
            "control_characters": "control characters removed",
            "lines_cut": "lines cut at the bound",
            "bytes_cut": "bytes lost by that",
            "records_split": "records split at the bound",
            "truncated": "compressed files that break off (what could be read of them was used)",
            "records_over_budget": "records longer than a row, split",
            "sessions_cut": "sessions closed or cut at the bound",
            "records_without_template": "records of no template, since their table was full (--max-templates)",
            "repeats_forgotten": "records forgotten by de-duplication, since its table was full",
        }
        lines += [f"{what}: {n[name]:,}" for name, what in odd.items() if n[name]]
        masked = self.of("masked")
        lines.append("masked: " + (", ".join(f"{name} {k:,}" for name, k in masked.items()) or "nothing"))
        lines.append(
            f"left out: {n['duplicates']:,} exact duplicates, {n['thinned']:,} records that say what many others say; "
            f"{n['kept']:,} records kept; {n['templates']:,} templates"
        )
        lines += [f"no row for {k:,} records: {what}" for what, k in self.of("without").items()]
        rows = ", ".join(f"{name} {k:,}" for name, k in self.of("rows").items()) or "none"
        lines.append(f"rows: {rows}; {n['tokens']:,} tokens")
        if n["validation_rows"]:
            lines.append(f"of these for validation: {n['validation_rows']:,} rows, {n['validation_tokens']:,} tokens")
        return "\n".join(lines)
