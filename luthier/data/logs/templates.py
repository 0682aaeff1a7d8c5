"""Template mining: which records say the same but for their numbers, names and addresses.

drain3 finds the templates. It is asked for few records: texts are compared with their time cut off and their numbers
replaced, and what it said of such a text is remembered, since a log repeats itself. All tables have a bound in bytes:
the memory of texts is emptied when it is full; when there are `max_templates`, or TEMPLATE_BYTES of them, no more are
made, and a record that fits none has template 0.
"""

from __future__ import annotations

import logging
import re
import sys
from operator import eq
from typing import Any

from luthier.data.logs import settings as bounds
from luthier.data.logs.records import LEAD
from luthier.data.logs.repeats import Memo
from luthier.errors import ConfigError

log = logging.getLogger("luthier")

_NUMBERS = re.compile(
    r"(?<![A-Za-z])[-+]?(?:0x[0-9A-Fa-f]+|\d+(?:[.:,/-]\d+)*)(?:ms|us|ns|s|m|h|%|[KMGT]?i?B)?(?![A-Za-z\d])|\d+",
    re.ASCII,
)
_HEX = re.compile(r"(?<![A-Za-z0-9])(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{6,}(?:-[0-9a-f]{4,})*(?![A-Za-z0-9])", re.ASCII)
_PSEUDONYM = re.compile(r"<([A-Z][A-Z_]*?)_[0-9a-f]{8}>")
LONGEST = 1500
"""Characters of a record that its template is made of."""
MOST_WORDS = 120
COMPARED = 16
"""Templates of as many words, with the same first two, that a text is compared with: the latest."""


class Templates:
    """The templates of all sources."""

    def __init__(self, most: int, similarity: float) -> None:
        try:
            from drain3.drain import Drain
        except ImportError as error:
            raise ConfigError("template mining needs the package drain3: pip install 'luthier[logs]'") from error

        class Bounded(Drain):
            """Drain, which compares a text with as many templates of a leaf as is stated, the latest: in a log without
            any templates a leaf has thousands."""

            def fast_match(self, cluster_ids: Any, tokens: Any, sim_th: float, include_params: bool) -> Any:
                del cluster_ids[:-COMPARED]
                best, most = None, (-1, -1)
                for number in cluster_ids:
                    cluster = self.id_to_cluster[number]
                    words = cluster.log_template_tokens
                    same = sum(map(eq, words, tokens))
                    if not include_params and same < most[0]:
                        continue
                    free = words.count(self.param_str)
                    same += free if include_params else 0
                    if (same, free) > most:
                        best, most = cluster, (same, free)
                        if same == len(words):
                            break
                return best if most[0] >= sim_th * len(tokens) else None

        self._drain = Bounded(depth=5, sim_th=similarity, max_children=100, parametrize_numeric_tokens=False)
        self._most = most
        self._known: Memo[int] = Memo(bounds.MEMO_BYTES)
        self._bytes = 0  # of the templates, about
        self.sizes: dict[int, int] = {}
        """How many records each has, thinned ones and duplicates too."""
        self.full = False

    def of(self, text: str) -> int:
        """The template's number, from 1; 0: none, since the table is full."""
        reduced = reduce(text)
        number = self._known.get(reduced)
        if number is None:
            number = self._mined(reduced)
            self._known.put(reduced, number)
        return number

    def forget(self) -> None:
        """What was said of texts; not the templates."""
        self._known.forget()

    def _mined(self, reduced: str) -> int:
        if len(self._drain.id_to_cluster) < self._most and self._bytes < bounds.TEMPLATE_BYTES:
            cluster, what = self._drain.add_log_message(reduced)
            if what == "cluster_created":
                # A word is about 60 bytes and its place, unless another template has it, too; the nodes of the tree.
                cluster.log_template_tokens = tuple(map(sys.intern, cluster.log_template_tokens))
                self._bytes += 1000 + 68 * len(cluster.log_template_tokens) + len(reduced)
            return int(cluster.cluster_id)
        if not self.full:
            self.full = True
            said = "there are %s templates (at most --max-templates, or %d MiB); records that fit none are not thinned"
            log.warning(said, f"{len(self):,}", bounds.TEMPLATE_BYTES >> 20)
        cluster = self._drain.match(reduced, full_search_strategy="never")
        return int(cluster.cluster_id) if cluster is not None else 0

    def text(self, number: int) -> str:
        """The template as it is known now."""
        cluster = self._drain.id_to_cluster.get(number)
        return cluster.get_template() if cluster is not None else ""

    def __len__(self) -> int:
        return len(self._drain.id_to_cluster)

    # --- for a run that goes on

    def state(self) -> dict[str, Any]:
        drain = self._drain
        clusters = [[c.cluster_id, " ".join(c.log_template_tokens), c.size] for c in drain.id_to_cluster.values()]
        sizes = [[number, n] for number, n in self.sizes.items()]
        return {"clusters": clusters, "tree": _tree(drain.root_node), "bytes": self._bytes,
                "sizes": sizes, "full": self.full}  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        from drain3.drain import LogCluster

        drain = self._drain
        for number, text, size in state["clusters"]:
            cluster = LogCluster(map(sys.intern, text.split(" ")) if text else [], number)
            cluster.size = size
            drain.id_to_cluster[number] = cluster
        drain.clusters_counter = len(drain.id_to_cluster)
        _grow(drain.root_node, state["tree"])
        self._bytes = state["bytes"]
        self.sizes = dict(state["sizes"])
        self.full = state["full"]


def reduce(text: str) -> str:
    """What of a record is compared: without its time, numbers as <NUM>, up to a bound, in one line."""
    text = text[:LONGEST]
    found = LEAD.match(text)
    body = text[found.end() :] if found else text
    if "_" in body and "<" in body:
        body = _PSEUDONYM.sub(r"<\1>", body)
    body = _NUMBERS.sub("<NUM>", _HEX.sub("<HEX>", body))
    return " ".join(body.split()[:MOST_WORDS])


def _tree(node: Any) -> list[Any]:
    return [node.cluster_ids, {token: _tree(child) for token, child in node.key_to_child_node.items()}]


def _grow(node: Any, told: list[Any]) -> None:
    node.cluster_ids = list(told[0])
    for token, child in told[1].items():
        node.key_to_child_node[token] = type(node)()
        _grow(node.key_to_child_node[token], child)
