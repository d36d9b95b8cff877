from tests.cuda_host.modes import mode as mode
