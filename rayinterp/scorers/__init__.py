"""Further scorers: what else can be asked of an explanation than the activations that it predicts.

detection, fuzzing   an LLM judges test records by the explanation          balanced accuracy
intruder             an LLM finds the silent text among activating ones     accuracy; no explanation
surprisal            what the explanation takes off a model's loss          AUROC, activating against silent
embedding            cosine of the explanation and the text                 AUROC, activating against silent

By the names and definitions of Paulo et al. 2024 (Automatically Interpreting Millions of Features in Large Language
Models); docs/scores.md says where ours depart from their library.
"""
