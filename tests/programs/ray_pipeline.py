"""A pipeline of one's own over the files in `in`, run in their folder."""

import ray

import fastood.ray

ray.init(num_cpus=2, include_dashboard=False)
(
    ray.data.read_parquet("in")
    .map_batches(
        fastood.ray.Scorer,
        fn_constructor_kwargs={"methods": ["energy", "msp"], "norm": None},
        batch_format="pyarrow",
        batch_size=64,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    .write_parquet("out")
)
