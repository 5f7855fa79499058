"""One workload per operation, with the operation's name, and `scored_layers`: all of a tower's scored layers."""

from bench.workloads.base import Workload
from bench.workloads.cls_attention import ClsAttention
from bench.workloads.cls_probs import ClsProbs
from bench.workloads.compact import Compact
from bench.workloads.compact_kv import CompactKV
from bench.workloads.coverage import Coverage
from bench.workloads.maxmin import MaxMin
from bench.workloads.merge_nearest import MergeNearest
from bench.workloads.merge_neighbors import MergeNeighbors
from bench.workloads.received import Received
from bench.workloads.row_scores import RowScores
from bench.workloads.scored_layers import ScoredLayers
from bench.workloads.select import Select
from bench.workloads.similarity import Similarity
from bench.workloads.topk import TopK

# In the order in which they are timed: the most important first, in case the time runs out.
WORKLOADS: dict[str, Workload] = {
    "scored_layers": ScoredLayers(),
    "cls_probs": ClsProbs(),
    "select": Select(),
    "cls_attention": ClsAttention(),
    "row_scores": RowScores(),
    "topk": TopK(),
    "compact": Compact(),
    "compact_kv": CompactKV(),
    "merge_neighbors": MergeNeighbors(),
    "merge_nearest": MergeNearest(),
    "maxmin": MaxMin(),
    "received": Received(),
    "similarity": Similarity(),
    "coverage": Coverage(),
}
