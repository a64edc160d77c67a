"""The three observations that VISOR rests on (arXiv 2603.23495), to be made again on any supported model.

    attention      how much of what the text attends to is image, layer by layer
    cka            how far the visual tokens have moved from what they were after the first layer
    layer_drop     the schedule that takes the image away from one layer

All observe the dense model: what a model does with an image before anybody makes it cheaper. The harness
(`evaluations.analyses`) imports this room; it knows `inference/` and everything below. Its command hands over to the
harness, which has the tasks and the run folder.
"""
