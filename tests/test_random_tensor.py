# Copyright 2026 The trl-udm authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import pytest
import torch

from trl_udm.random_tensor import rand_tensor, randint_tensor


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_generator_on_the_cpu_serves_every_device(device):
    generator = torch.Generator().manual_seed(0)
    assert rand_tensor((2, 3), generator, device).device.type == device
    assert randint_tensor(5, (2, 3), generator, device).device.type == device
    # The generator has moved on as if the draws had been plain ones
    plain = torch.Generator().manual_seed(0)
    torch.rand(2, 3, generator=plain)
    torch.randint(5, (2, 3), generator=plain)
    assert torch.equal(torch.rand(1, generator=generator), torch.rand(1, generator=plain))


def test_draws_are_pytorchs():
    for generator, plain in ((None, None), (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1))):
        torch.manual_seed(0)
        draws = rand_tensor((2, 3), generator, "cpu", torch.float64), randint_tensor(5, (4,), generator)
        torch.manual_seed(0)
        expected = torch.rand(2, 3, generator=plain, dtype=torch.float64), torch.randint(5, (4,), generator=plain)
        assert torch.equal(draws[0], expected[0]) and torch.equal(draws[1], expected[1])
