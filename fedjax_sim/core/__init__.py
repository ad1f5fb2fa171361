"""The words of every room: tasks, models, algorithms, stacked pytrees, randomness, fields, errors.

The glossary. A letter is an axis, the same in all docstrings of `core/` and `engine/`:

    N   clients of the population
    K   slots of a round, one for each client of its cohort
    m   some of the clients or slots, those that are asked for
    D   devices
    W   waves of a device
    S   places of a device, those of all its waves: S = W * L
    L   lanes of a wave, clients that train side by side
    R   rounds of a call
    T   rows of the table that says who holds which sample
    n   samples of a set
    B   samples of a batch, padding included
    t   samples of one client
    C   classes
    d   features of a representation
    s   statistics of a sample, from which a metric is made
    P   numbers of a model or a leaf, as one vector

`f32[K, C]` is a float32 array with these axes, `[K, …]` a pytree whose leaves all lead with K, `key[K]` an
array of typed PRNG keys, `[]` a scalar. Where a function is asked for a size, that argument's own name stands
for the axis: `i32[length]`.

    client      one of the N that hold samples; it is named by its id
    cohort      the clients of a round, one in each slot
    slot        a position in the cohort: K models are stacked in this order
    place       a position in which a device trains a slot; an empty one trains nobody
    wave        clients that one device trains side by side, one in each lane
    start       the model from which a client trains; `sent` until the client has made its own start of it
    deployed    the model that a user would be given after a round
    broadcast   what the server sends to all clients besides the model
    upload      what a client sends back besides the model
"""
