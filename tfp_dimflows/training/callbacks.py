"""Keras callbacks."""

import keras


class KLWarmup(keras.callbacks.Callback):
    """Lets the weight of the KL term in the training loss grow linearly from 0 to 1.

    In training step t the loss of a model with a `dfd.VAEPrior` is

        -bound - (1 - min(1, t / steps)) KL(q(e | z) || N(0, I))

    so that the posterior is not driven into the prior before the decoder has learned to use it. Metrics, validation and
    `log_prob` are of the bound itself, always. t is the optimizer's count, so a resumed training goes on where it was; with
    `steps_per_execution` the weight changes once per execution.

    Args:
      steps: number of optimisation steps after which the weight is 1.

    Raises:
      ValueError: if `steps` is not positive, or the model has no KL term.

    References: Bowman, Vilnis, Vinyals, Dai, Jozefowicz, Bengio, "Generating sentences from a continuous space", 2016.

    #### Example

    >>> flow = dimflows.recipes.flow_vae([4, 4, 1], latent_dims=2, width=4, num_blocks=1)
    >>> model = dimflows.FlowModel(flow, seed=0)
    >>> model.compile()
    >>> history = model.fit(tf.zeros([8, 4, 4, 1]), verbose=0, callbacks=[dimflows.training.KLWarmup(steps=10)])
    >>> sorted(history.history)
    ['bits_per_dim', 'kl', 'loss', 'nll', 'reconstruction']
    """

    def __init__(self, steps: int):
        super().__init__()
        if steps < 1:
            raise ValueError(f"KLWarmup: got steps={steps}, needs a positive number")
        self.steps = steps

    def on_train_begin(self, logs=None):
        """Checks the model."""
        if getattr(self.model, "kl_weight", None) is None:
            raise ValueError(f"KLWarmup: {self.model.name} has no KL term; only a dfd.VAEPrior has one")

    def on_train_batch_begin(self, batch, logs=None):
        """Sets the weight for this step."""
        self.model.kl_weight.assign(min(1.0, int(self.model.optimizer.iterations) / self.steps))

    def on_train_end(self, logs=None):
        """Sets the weight to 1."""
        self.model.kl_weight.assign(1.0)
