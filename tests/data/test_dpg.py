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


import re

import pytest

from trl_udm.data.dpg import load_dpg


HEADER = "item_id,text,keywords,proposition_id,dependency,category_broad,question_natural_language\n"
TABLE = HEADER + (
    'hat,"A red hat, on a dog",hat,1,0,entity,Is there a hat?\n'
    'hat,"A red hat, on a dog",hat,2,1,attribute,Is the hat red?\n'
    "cat,A cat,cat,1,0,entity,Is there a cat?\n"
    'hat,"A red hat, on a dog",hat,3,"1,2",relation,Is the hat on a dog?\n'
)


def test_the_questions_of_a_prompt_are_put_together(tmp_path):
    (tmp_path / "dpg.csv").write_text(TABLE)
    first, second = load_dpg(tmp_path / "dpg.csv")
    assert first["prompt"] == "A red hat, on a dog" and second["prompt"] == "A cat"
    assert first["questions"][2] == {"id": 3, "question": "Is the hat on a dog?", "dependency": [1, 2]}
    assert second["questions"] == [{"id": 1, "question": "Is there a cat?", "dependency": []}]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("prompt\nA cat\n", "must have the columns of DPG-Bench, got a table without ['item_id', 'text',"),
        (HEADER + "a,A cat,cat,one,0,entity,Is it?\n", "Row 0: `proposition_id` and `dependency` must be numbers"),
        (TABLE + "cat,A dog,cat,2,0,entity,Is it?\n", "Row 4: `text` must be that of the other rows of 'cat'"),
        (HEADER + "a,A cat,cat,1,0,entity,\n", "`question_natural_language` not be empty, got 'A cat' and ''."),
        (TABLE + "cat,A cat,cat,1,0,entity,Is it?\n", "The questions of 'cat' must have numbers that differ"),
        (TABLE + "cat,A cat,cat,2,7,entity,Is it?\n", "got [1, 2] and dependencies on [7]."),
    ],
)
def test_a_malformed_table_is_refused(tmp_path, table, message):
    (tmp_path / "dpg.csv").write_text(table)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_dpg(tmp_path / "dpg.csv")
