"""Small worlds drawn from seeds: images, questions and the ground truth of what stands where.

Training reads the "train" split, model selection the "validation" split, the benchmark tasks the "test" split. The
splits of one world never share a seed, a handwritten scan, or an easy-VQA image. On the lowest floor: any room may
import it, and it imports none.
"""
