"""The closed-form merge of specialists: six steps, each of them convex. :mod:`.merge` tells the story in this order.

The specialists' weights first become one: their mean (:mod:`.average`), embeddings by element, is where every step
starts and what it is pulled to. Then, for one block of the network after the other,

1. **sequential inputs** (:mod:`.calibration`): what enters a layer comes from the
   merged model as built so far, what should leave it from each specialist's own pass;
2. **normalized rows, anchored ridge** (:mod:`.layerwise`): every layer is solved on values and directional derivatives
   (:mod:`.tangents`), specialists counting the same, pulled to the mean;
3. **equivariant layers** (:mod:`ase_gffmerge.models.affine_maps`): one such problem per irrep, so that equivariance is
   exact;
4. **message-level targets** (:mod:`.blockwise`): all layers of the block are corrected together on its output;

and for the whole:

5. **a force-matched readout** (:mod:`.readout_fit`): energies, forces and stresses are linear in the last layer, and in
   many more random features of the same network (:mod:`.random_features`); on frames and copies that each specialist
   visits (:mod:`.augmentation`), along displacements and strains (:mod:`.tangents`);
6. **energy references** (:mod:`.average`): one zero of energy for all.

:mod:`.report` compares the result with every specialist and gives the verdict. :mod:`.paper` is the
reference method, which the steps differ from; :mod:`.recipe` holds all options; :mod:`.average` says who may be
merged. :mod:`.modules` merges graph neural networks of any kind (:mod:`.module_inputs`, :mod:`.module_calls`,
:mod:`.module_layers`, :mod:`.module_views`), and :mod:`.external_calculators` with it the networks inside other packages'
calculators.
"""
