"""The Spectrum scan: the signal-to-noise ratio of every weight matrix, streamed from a checkpoint's files.

Needs numpy and scipy, never torch. Memory stays near one matrix, whatever the model's size.

- `walk`: over a checkpoint, with a cache that makes a scan resume;
- `stream`: one stored tensor in blocks of float32;
- `singular`: singular values of a streamed matrix;
- `score`: both scores of one spectrum;
- `select`: the top share of each module type;
- `files`: the reference's formats, in and out.
"""
