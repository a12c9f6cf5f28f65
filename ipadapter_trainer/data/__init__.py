"""Images on disk or in shards -> batches.

`examples` lists the images with their captions, and `buckets` gives each a size and deals them into batches of
`SampleIndex`. In a worker, `dataset` opens each image (`images`), crops and flips it, tokenizes the caption and draws
the noise (`preprocess`), all from the random key of that index (`augmentation`), and `collate` stacks the rows.

Shards that are not cached are streamed instead: `shards` reads their samples in order (`tar_samples`) and preprocesses
them in the same way. `check` reads a whole data set and reports its faults.
"""
