import pytest
pytestmark = pytest.mark.model
def test_chain(chain):
    print(chain.steps[1].artifact.manifest["record"])
    assert not chain.pending
