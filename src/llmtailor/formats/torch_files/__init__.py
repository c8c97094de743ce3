"""Files of ``torch.save``, read and written without torch and without running a pickle.

``open_torch_file`` gives the tree that was saved: plain Python values, tensors as references into the file, and every
other object as an inert node that remembers its class by name. ``plan_torch_file`` is the way back.
"""
