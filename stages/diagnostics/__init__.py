"""What training did to the weights, read from the checkpoints: norms, ranks, spectra, intruder dimensions.

`update.diagnose` compares a stage's model with what was trained from; `lineage.directions` sets the updates of all
stages so far beside one another. Both go into the artifact as ``diagnostics.json``::

    {
      "format": 1,
      "depth": "spectra" | "norms",
      "reason": null,                  # why there is nothing to tell, where "matrices" and "others" are empty
      "against": "start" | "dequantised start",
      "intruders": {"k": 10, "epsilon": 0.5},
      "matrices": [                    # those inside the numbered layers that changed, in order of layer
        {"name": ..., "layer": 3, "type": "mlp.up_proj", "expert": null, "shape": [rows, columns],
         "planned": true | false | null,           # whether the method selected it; null where it selects none
         "norm": ..., "relative_norm": ...,        # Frobenius; relative to the start's
         "stable_rank": ..., "effective_rank": ..., "rank_estimated": false,
         "singular_values": [...],                 # of the update, largest first, 16 at most
         "intruders": 2 | null}                    # null: not told (depth norms, or too large to tell)
      ],
      "others": [{"name": ..., "norm": ..., "relative_norm": ...}],   # vectors, embeddings, heads that changed
      "unchanged": 120,                # matrices that training left as they were
      "layers": {"0": 0.12, ...}, "types": {"mlp.up_proj": 0.4, ...},  # shares of the update's squared norm
      "outside": 0.31,                 # the share of it outside the numbered layers
      "unplanned": 0.0 | null,         # the share of it in what was not to train; null where that is not known
      "norm": ..., "relative_norm": ...,           # over all weights
      "rounding": {"norm": ..., "relative_norm": ...} | null,         # what quantising the start itself changed
      "lineage": {                     # the stages up to this one
        "names": ["knowledge", "answers"],
        "norms": [..., ...],           # of each stage's update
        "cosines": [[1.0, -0.1], [-0.1, 1.0]],     # between the updates, as one long vector each
        "from_base": ..., "relative_from_base": ...
      }
    }
"""
