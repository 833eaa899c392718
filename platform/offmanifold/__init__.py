"""Do models that know what they don't know resist adversarial examples?

Data gives a model; inference gives a posterior; draws from it give a predictive; a predictive gives
``log_probs`` of shape (draws, batch, classes); every measure, attack and metric is a function of that.

Imports go one way: a module imports what stands in its own line or above it (``tests/test_architecture.py`` reads this list)::

    randomness progress     named streams of random numbers; how long work tells where it is
    models                  torch modules, and LeNet in JAX
    density                 p(z) of latents, exactly; p(x) of images, by integrating over them
    data                    labelled images in [0, 1], with a fingerprint
    predictive              what a posterior gives when functions are drawn from it
    uncertainty             measures of log_probs
    inference               data + model -> posterior
    result                  what a computation is (a cell) and what it gives (a result)
    grid                    many cells: by product, by list
    attacks                 what is ascended (losses), what is allowed (threat), how (gradient, noise)
    evaluation              success, intervals
    experiments             one file = one question
    orchestration           Ray and MLflow, and nowhere else
"""

__version__ = "0.1.0"
